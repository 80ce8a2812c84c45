/* Restores of several small tasks from a pages file, with copiers: whichever thread
 * brings the last page of each, all of them end.
 *
 * pager_ends ROUNDS */

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "internal.h"

#define NR_TASKS 12
#define NR_PAGES 64
#define LENGTH ((size_t)NR_PAGES * CRIUPY_PAGE_SIZE)

static void *add_task(struct criupy_pager *pager, int32_t pid, int file)
{
	void *memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint64_t address = (uintptr_t)memory, nr_pages = NR_PAGES, data = 0;
	int uffd = criupy_uffd_open(O_CLOEXEC | O_NONBLOCK | 1); /* UFFD_USER_MODE_ONLY */
	struct criupy_image *image;
	uint64_t offered;

	CHECK(memory != MAP_FAILED && uffd >= 0 && !criupy_uffd_api(uffd, 0, &offered));
	CHECK(!criupy_uffd_register(uffd, address, LENGTH, &offered));
	CHECK(!criupy_image_create(&image, (uint64_t)pid, &address, &nr_pages, &data, NULL, 1));
	CHECK(!criupy_image_attach(image, file));
	CHECK(!criupy_pager_add_task(pager, pid, uffd, image));
	return memory;
}

int main(int argc, char **argv)
{
	const struct criupy_pager_config config = {
		.link_timeout_ns = UINT64_MAX, .nr_buffers = 16, .request_pages = 128, .fault_around_pages = 1, .nr_copiers = 2,
	};
	int file = memfd_create("pages", MFD_CLOEXEC);

	if (argc != 2)
		return 2;
	alarm(60);
	CHECK(file >= 0 && !ftruncate(file, (off_t)LENGTH));
	for (int round = 0; round < atoi(argv[1]); round++) {
		void *memory[NR_TASKS];
		struct criupy_pager *pager;
		struct criupy_stats stats;
		int restore[2];

		CHECK(!criupy_pager_create(&pager, &config));
		for (int i = 0; i < NR_TASKS; i++)
			memory[i] = add_task(pager, i + 1, file);
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, restore));
		CHECK(!criupy_pager_watch_restore(pager, restore[0]));
		CHECK(write(restore[1], "FTSR", 4) == 4);
		do {
			usleep(200);
			criupy_pager_snapshot(pager, &stats);
		} while (stats.phase != CRIUPY_PHASE_ENDED);
		CHECK(stats.outcome == CRIUPY_OUTCOME_COMPLETE && stats.pages_background == NR_TASKS * NR_PAGES);
		criupy_pager_destroy(pager);
		close(restore[1]);
		for (int i = 0; i < NR_TASKS; i++)
			munmap(memory[i], LENGTH);
	}
	return 0;
}
