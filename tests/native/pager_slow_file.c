/* A pages file on a slow disk: a fault may wait for what the pager itself reads, but
 * not for what copiers read besides. Prints how many reads the longest wait took. */

#include <sys/syscall.h>
#include <time.h>

#include "filled.h"

#define NR_PAGES 8192
#define NR_TOUCHES 12
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
	struct criupy_pager *pager;
	const uint8_t *memory;
	double longest = 0;

	alarm(60);
	CHECK(!criupy_pager_create(&pager, &filled_config));
	memory = filled_task(pager, 1, filled_file(NR_PAGES), NR_PAGES);
	filled_finish(pager);
	for (int i = 1; i <= NR_TOUCHES; i++) {
		const volatile uint8_t *page = memory + (size_t)(NR_PAGES - i * 512) * CRIUPY_PAGE_SIZE;
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
