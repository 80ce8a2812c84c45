/* The userfaultfd ioctls, each with both of its results. */

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "internal.h"

/* Linux 6.6; older headers do not have it. */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

int criupy_uffd_open(int flags)
{
	long fd = syscall(SYS_userfaultfd, flags);

	return fd < 0 ? -errno : (int)fd;
}

int criupy_uffd_api(int uffd, uint64_t features, uint64_t *offered)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };

	if (ioctl(uffd, UFFDIO_API, &api) < 0)
		return -errno;
	*offered = api.features;
	return 0;
}

int criupy_uffd_register(int uffd, uint64_t start, uint64_t length, uint64_t *ioctls)
{
	struct uffdio_register reg = {
		.range = { .start = start, .len = length },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		return -errno;
	*ioctls = reg.ioctls;
	return 0;
}

int criupy_uffd_unregister(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_range range = { .start = start, .len = length };

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

/* The kernel reports progress through the structure, also beside an error;
 * where it wrote an error there, nothing was done. */
static int outcome(int ret, int64_t done, uint64_t *progress)
{
	int error = ret < 0 ? -errno : 0;

	*progress = done > 0 ? (uint64_t)done : 0;
	return error;
}

int criupy_uffd_copy(int uffd, uint64_t dst, const void *src, uint64_t length, uint64_t *progress)
{
	struct uffdio_copy copy = { .dst = dst, .src = (uintptr_t)src, .len = length };
	int ret = ioctl(uffd, UFFDIO_COPY, &copy);

	return outcome(ret, copy.copy, progress);
}

int criupy_uffd_zeropage(int uffd, uint64_t start, uint64_t length, uint64_t *progress)
{
	struct uffdio_zeropage zero = { .range = { .start = start, .len = length } };
	int ret = ioctl(uffd, UFFDIO_ZEROPAGE, &zero);

	return outcome(ret, zero.zeropage, progress);
}

int criupy_uffd_poison(int uffd, uint64_t start, uint64_t length, uint64_t *progress)
{
	struct uffdio_poison poison = { .range = { .start = start, .len = length } };
	int ret = ioctl(uffd, UFFDIO_POISON, &poison);

	return outcome(ret, poison.updated, progress);
}

int criupy_uffd_wake(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_range range = { .start = start, .len = length };

	return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

int criupy_uffd_alive(int uffd)
{
	/* The kernel takes hold of the address space before it looks at either
	 * end of the copy, so one that cannot work tells without touching
	 * anything: from the second page, which no process may map. */
	uint64_t progress;
	int ret = criupy_uffd_copy(uffd, 0x10000, (const void *)CRIUPY_PAGE_SIZE, CRIUPY_PAGE_SIZE, &progress);

	return ret != -ESRCH && ret != -ENOSPC;
}
