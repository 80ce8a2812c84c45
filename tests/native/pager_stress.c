/* The pager under load, for sanitizers: two processes (stress_target) that
 * change their memory from several threads, and a source that answers late and
 * short. The main thread looks at the pager while it works, as Python does.
 *
 * pager_stress TARGET SEED ROUNDS HOW, HOW being
 *   finish   restore-finished after a while; everything arrives
 *   early    restore-finished only once the targets are done: no background
 *   poison   the source closes midway; what is missing is poisoned
 *   destroy  the pager is destroyed midway */

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "internal.h"
#include "stress.h"

#define NR_TARGETS 2
#define CHECK(condition)                                                            \
	do {                                                                        \
		if (!(condition)) {                                                 \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__,      \
				#condition, strerror(errno));                       \
			_exit(1);                                                   \
		}                                                                   \
	} while (0)

struct source {
	int fd;
	uint64_t seed;
	uint64_t answers;	/* close after so many, 0: when told */
	bool told;		/* it ended with CLOSE */
};

static bool receive_all(int fd, void *into, size_t length)
{
	for (size_t have = 0; have < length;) {
		ssize_t got = read(fd, (char *)into + have, length - have);

		if (got <= 0)
			return false;
		have += (size_t)got;
	}
	return true;
}

static bool send_all(int fd, const void *data, size_t length)
{
	for (size_t sent = 0; sent < length;) {
		ssize_t ret = send(fd, (const char *)data + sent, length - sent, MSG_NOSIGNAL);

		if (ret <= 0)
			return false;
		sent += (size_t)ret;
	}
	return true;
}

static uint32_t random_below(uint64_t *seed, uint32_t limit)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return (uint32_t)(*seed >> 11) % limit;
}

static void *serve(void *arg)
{
	static const int32_t status;
	struct source *source = arg;
	uint64_t *pages = malloc(64 * CRIUPY_PAGE_SIZE);
	uint8_t header[CRIUPY_FRAME_32];
	struct criupy_frame frame;
	const size_t words = CRIUPY_PAGE_SIZE / sizeof(*pages);

	CHECK(pages);
	for (uint64_t nr = 1; receive_all(source->fd, header, sizeof(header)); nr++) {
		CHECK(!criupy_frame_decode(&frame, header, sizeof(header)));
		if (frame.cmd == CRIUPY_CMD_CLOSE) {
			CHECK(send_all(source->fd, &status, sizeof(status)));
			source->told = true;
			CHECK(!receive_all(source->fd, header, 1));
			break;
		}
		CHECK(frame.cmd == CRIUPY_CMD_GET && frame.nr_pages && frame.nr_pages <= 64);
		if (source->answers && nr > source->answers)
			break;
		frame.cmd = CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16;
		frame.nr_pages = 1 + random_below(&source->seed, (uint32_t)frame.nr_pages);
		for (uint64_t i = 0; i < frame.nr_pages * words; i++)
			pages[i] = frame.vaddr / CRIUPY_PAGE_SIZE + i / words + 1;
		if (!random_below(&source->seed, 4))
			usleep(random_below(&source->seed, 300));
		CHECK(!criupy_frame_encode(&frame, header, sizeof(header)));
		if (!send_all(source->fd, header, sizeof(header)) ||
		    !send_all(source->fd, pages, frame.nr_pages << PAGE_SHIFT))
			break;
	}
	close(source->fd);
	free(pages);
	return NULL;
}

static void connect_pair(int *ours, int *theirs)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	const int on = 1;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	*ours = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(listener >= 0 && *ours >= 0);
	CHECK(!bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&address, &length));
	CHECK(!connect(*ours, (struct sockaddr *)&address, length));
	*theirs = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(*theirs >= 0);
	CHECK(!setsockopt(*ours, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	CHECK(!setsockopt(*theirs, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	close(listener);
}

struct target {
	pid_t pid;
	int orders;
};

static int start_target(struct target *t, char *path, char *seed, char *rounds, uint64_t *address)
{
	union {
		char room[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec into = { address, sizeof(*address) };
	struct msghdr message = { .msg_iov = &into, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	int pair[2], uffd;

	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	t->pid = fork();
	CHECK(t->pid >= 0);
	if (!t->pid) {
		if (pair[1] == 3)
			(void)fcntl(3, F_SETFD, 0);
		else
			dup2(pair[1], 3);
		execl(path, path, seed, rounds, (char *)NULL);
		_exit(127);
	}
	close(pair[1]);
	t->orders = pair[0];
	CHECK(recvmsg(t->orders, &message, MSG_CMSG_CLOEXEC) == sizeof(*address) && CMSG_FIRSTHDR(&message));
	memcpy(&uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(uffd));
	return uffd;
}

static void look(struct criupy_pager *pager, struct criupy_stats *stats)
{
	struct criupy_notice notice;

	while (criupy_pager_next_notice(pager, &notice))
		CHECK(notice.kind >= 1 && notice.kind <= CRIUPY_NOTICE_NOT_LOCKED);
	criupy_pager_snapshot(pager, stats);
	CHECK(!stats->error);
}

static void wait_until_poisoned(struct criupy_pager *pager, struct criupy_stats *stats)
{
	do {
		usleep(1000);
		look(pager, stats);
	} while (stats->link != CRIUPY_LINK_LOST || stats->phase == CRIUPY_PHASE_RESTORING);
	CHECK(!criupy_pager_poison(pager) && !criupy_pager_end(pager, 1));
}

int main(int argc, char **argv)
{
	const struct criupy_pager_config config = {
		.link_timeout_ns = UINT64_MAX, .nr_buffers = 3, .request_pages = 32,
	};
	const uint64_t nr_pages = NR_SLICES * SLICE_PAGES;
	struct target targets[NR_TARGETS];
	struct source source = { 0 };
	struct criupy_pager *pager;
	struct criupy_stats stats;
	pthread_t server;
	int restore[2], link, nr_left = NR_TARGETS;
	bool early, poison, destroy, ended = false;

	if (argc != 5)
		return 2;
	alarm(300); /* a guard: with it go the userfaultfds, and then the targets */
	early = !strcmp(argv[4], "early");
	poison = !strcmp(argv[4], "poison");
	destroy = !strcmp(argv[4], "destroy");
	source.seed = strtoull(argv[2], NULL, 0) * 2654435761u + 1;
	source.answers = poison ? 100 : 0;
	CHECK(!criupy_pager_create(&pager, &config));
	connect_pair(&link, &source.fd);
	CHECK(!criupy_pager_set_link(pager, link, CRIUPY_FRAME_32, 0, NULL));
	for (int i = 0; i < NR_TARGETS; i++) {
		struct criupy_image *image;
		uint64_t address;
		int uffd = start_target(&targets[i], argv[1], argv[2], argv[3], &address);

		CHECK(!criupy_image_create(&image, (uint64_t)targets[i].pid, &address, &nr_pages, NULL, NULL, 1));
		CHECK(!criupy_pager_add_task(pager, targets[i].pid, uffd, image));
	}
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, restore));
	CHECK(!criupy_pager_watch_restore(pager, restore[0]));
	CHECK(!pthread_create(&server, NULL, serve, &source));
	for (int i = 0; i < NR_TARGETS; i++)
		CHECK(write(targets[i].orders, "", 1) == 1);
	if (!early) {
		usleep(20000);
		CHECK(write(restore[1], "FTSR", 4) == 4);
	}
	if (poison)
		wait_until_poisoned(pager, &stats);
	if (destroy) {
		usleep(30000);
		criupy_pager_destroy(pager);
		pager = NULL;
	}
	while (nr_left) {
		int status, had_poison = poison || destroy;
		pid_t pid = waitpid(-1, &status, WNOHANG);

		CHECK(pid >= 0);
		if (pid) {
			CHECK(WIFEXITED(status));
			CHECK(!WEXITSTATUS(status) || (had_poison && WEXITSTATUS(status) == EXIT_POISONED));
			nr_left--;
		}
		if (pager)
			look(pager, &stats);
		usleep(500);
	}
	if (early)
		CHECK(write(restore[1], "FTSR", 4) == 4);
	while (pager && !ended) {
		look(pager, &stats);
		ended = stats.phase == CRIUPY_PHASE_ENDED;
		usleep(500);
	}
	if (pager) {
		CHECK(!stats.pages_missing && !stats.nr_outstanding && !stats.nr_live);
		CHECK(stats.outcome == (poison ? CRIUPY_OUTCOME_GIVEN_UP : CRIUPY_OUTCOME_COMPLETE));
		fprintf(stderr, "%llu faults, %llu requests, %llu forks, %llu again, %llu dropped, %llu zero\n",
			(unsigned long long)stats.nr_faults, (unsigned long long)stats.nr_requests,
			(unsigned long long)stats.nr_forks, (unsigned long long)stats.nr_again,
			(unsigned long long)stats.pages_dropped, (unsigned long long)stats.pages_zero);
	}
	criupy_pager_destroy(pager);
	pthread_join(server, NULL);
	CHECK(source.told || poison || destroy);
	close(restore[1]);
	for (int i = 0; i < NR_TARGETS; i++)
		close(targets[i].orders);
	return 0;
}
