/* A pages file on a slow disk: a fault may wait for what the pager itself reads, but
 * not for what copiers read besides. Prints how many reads the longest wait took. */

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "internal.h"

#define NR_PAGES 8192
#define NR_TOUCHES 12
#define LENGTH ((size_t)NR_PAGES * CRIUPY_PAGE_SIZE)
#define READ_US 60000

/* In the place of libc's: slow for whole pieces. */
ssize_t pread(int fd, void *into, size_t length, off_t offset)
{
	if (length > CRIUPY_PAGE_SIZE)
		usleep(READ_US);
	return syscall(SYS_pread64, fd, into, length, offset);
}

static double seconds(void)
{
	struct timespec now;

	CHECK(!clock_gettime(CLOCK_MONOTONIC, &now));
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

int main(void)
{
	const struct criupy_pager_config config = {
		.link_timeout_ns = UINT64_MAX, .nr_buffers = 16, .request_pages = 128, .fault_around_pages = 1, .nr_copiers = 2,
	};
	void *memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint64_t address = (uintptr_t)memory, nr_pages = NR_PAGES, data = 0;
	int uffd = criupy_uffd_open(O_CLOEXEC | O_NONBLOCK | 1); /* UFFD_USER_MODE_ONLY */
	int file = memfd_create("pages", MFD_CLOEXEC), restore[2];
	struct criupy_image *image;
	struct criupy_pager *pager;
	uint64_t offered;
	double longest = 0;

	alarm(60);
	CHECK(memory != MAP_FAILED && uffd >= 0 && file >= 0 && !ftruncate(file, (off_t)LENGTH));
	CHECK(!criupy_uffd_api(uffd, 0, &offered) && !criupy_uffd_register(uffd, address, LENGTH, &offered));
	CHECK(!criupy_image_create(&image, 1, &address, &nr_pages, &data, NULL, 1));
	CHECK(!criupy_image_attach(image, file));
	CHECK(!criupy_pager_create(&pager, &config) && !criupy_pager_add_task(pager, 1, uffd, image));
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, restore));
	CHECK(!criupy_pager_watch_restore(pager, restore[0]));
	CHECK(write(restore[1], "FTSR", 4) == 4);
	for (int i = 1; i <= NR_TOUCHES; i++) {
		const volatile uint8_t *page = (const uint8_t *)memory + (size_t)(NR_PAGES - i * 512) * CRIUPY_PAGE_SIZE;
		double began;

		usleep(READ_US / 3);
		began = seconds();
		(void)*page;
		if (seconds() - began > longest)
			longest = seconds() - began;
	}
	printf("%.2f\n", longest * 1e6 / READ_US);
	/* The pager poisons what is missing of this very process. */
	fflush(stdout);
	_exit(0);
}
