/* A pager that fills memory of this very process, for drivers. */

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "check.h"
#include "internal.h"

static const struct criupy_pager_config filled_config = {
	.link_timeout_ns = UINT64_MAX,
	.nr_buffers = 16,
	.request_pages = 128,
	.fault_around_pages = 1,
	.nr_copiers = 2,
};

/* A file of so many pages. */
static inline int filled_file(uint64_t nr_pages)
{
	int file = memfd_create("pages", MFD_CLOEXEC);

	CHECK(file >= 0 && !ftruncate(file, (off_t)(nr_pages * CRIUPY_PAGE_SIZE)));
	return file;
}

/* A task of so many pages, the first ones of the file, or without one (-1) the source's; its memory. */
static inline void *filled_task(struct criupy_pager *pager, int32_t pid, int file, uint64_t nr_pages)
{
	size_t length = (size_t)nr_pages * CRIUPY_PAGE_SIZE;
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint64_t address = (uintptr_t)memory, data = 0;
	int uffd = criupy_uffd_open(O_CLOEXEC | O_NONBLOCK | 1); /* UFFD_USER_MODE_ONLY */
	struct criupy_image *image;
	uint64_t offered;

	CHECK(memory != MAP_FAILED && uffd >= 0 && !criupy_uffd_api(uffd, 0, &offered));
	CHECK(!criupy_uffd_register(uffd, address, length, &offered));
	CHECK(!criupy_image_create(&image, (uint64_t)pid, &address, &nr_pages, file < 0 ? NULL : &data, NULL, 1));
	CHECK(file < 0 || !criupy_image_attach(image, file));
	CHECK(!criupy_pager_add_task(pager, pid, uffd, image));
	return memory;
}

/* Let the restore finish; the end of its socket that is not the pager's. */
static inline int filled_finish(struct criupy_pager *pager)
{
	int restore[2];

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, restore));
	CHECK(!criupy_pager_watch_restore(pager, restore[0]));
	CHECK(write(restore[1], "FTSR", 4) == 4);
	return restore[1];
}
