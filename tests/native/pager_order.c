/* A page that a thread waits for is put in place before what came earlier and nobody waits for. */

#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "filled.h"

#define NR_PAGES 64
#define NR_BULK 4	/* all that is sent fits one segment, and so is there at once */
#define TOUCHED 40

static const uint8_t *memory;
static int order[NR_PAGES], nr_copied;	/* the pager's alone until it has ended */

/* In the place of libc's: look at what is copied. */
int ioctl(int fd, unsigned long request, ...)
{
	va_list rest;
	void *argument;
	long ret;

	va_start(rest, request);
	argument = va_arg(rest, void *);
	va_end(rest);
	ret = syscall(SYS_ioctl, fd, request, argument);
	if (request == UFFDIO_COPY && !ret) {
		const struct uffdio_copy *copy = argument;

		order[nr_copied++] = (int)((copy->dst - (uintptr_t)memory) / CRIUPY_PAGE_SIZE);
	}
	return (int)ret;
}

static struct criupy_frame receive(int fd)
{
	uint8_t encoded[CRIUPY_FRAME_32];
	struct criupy_frame frame;

	CHECK(recv(fd, encoded, sizeof(encoded), MSG_WAITALL) == sizeof(encoded));
	CHECK(!criupy_frame_decode(&frame, encoded, sizeof(encoded)));
	return frame;
}

static size_t answer(uint8_t *into, struct criupy_frame frame)
{
	size_t length = (size_t)frame.nr_pages * CRIUPY_PAGE_SIZE;

	frame.cmd = CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16;
	CHECK(!criupy_frame_encode(&frame, into, CRIUPY_FRAME_32));
	memset(into + CRIUPY_FRAME_32, 1, length);
	return CRIUPY_FRAME_32 + length;
}

static void *touch(void *unused)
{
	(void)unused;
	CHECK(*(const volatile uint8_t *)(memory + (size_t)TOUCHED * CRIUPY_PAGE_SIZE) == 1);
	return NULL;
}

int main(void)
{
	struct criupy_pager_config config = filled_config;
	static uint8_t out[2 * CRIUPY_FRAME_32 + (NR_BULK + 1) * CRIUPY_PAGE_SIZE];
	struct criupy_frame bulk, demand;
	struct criupy_pager *pager;
	struct criupy_stats stats;
	pthread_t toucher;
	size_t length;
	int pair[2];

	alarm(60);
	config.nr_copiers = 0;
	config.request_pages = config.window_pages = NR_BULK;
	CHECK(!criupy_pager_create(&pager, &config));
	memory = filled_task(pager, 1, -1, NR_PAGES);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK(!criupy_pager_set_link(pager, pair[0], CRIUPY_FRAME_32, 0, CRIUPY_LANE_BULK, NULL, NULL, 0));
	filled_finish(pager);
	bulk = receive(pair[1]);
	CHECK(bulk.nr_pages == NR_BULK);
	CHECK(!pthread_create(&toucher, NULL, touch, NULL));
	demand = receive(pair[1]);
	CHECK(demand.nr_pages == 1);
	length = answer(out, bulk);
	length += answer(out + length, demand);
	CHECK(send(pair[1], out, length, 0) == (ssize_t)length);
	CHECK(!pthread_join(toucher, NULL));
	do
		criupy_pager_snapshot(pager, &stats);
	while (stats.pages_background < NR_BULK && !usleep(200));
	for (int i = 0; i < nr_copied && i < 2; i++)
		printf("%d\n", order[i]);
	/* The pager poisons what is missing of this very process. */
	fflush(stdout);
	_exit(0);
}
