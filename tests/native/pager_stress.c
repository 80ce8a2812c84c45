/* The pager under load, for sanitizers: two processes (stress_target) that
 * change their memory from several threads, and a source that answers late and
 * short. The main thread looks at the pager while it works, as Python does.
 *
 * pager_stress TARGET SEED ROUNDS LANES HOW. LANES is 1 for a stock source, 2 for
 * one with a lane for what is urgent, either of which is lost now and then and
 * made again, 0 for pages files; with a + the source has but half of the pages, and
 * pages files the others. HOW is one of
 *   finish   restore-finished after a while; everything arrives
 *   early    restore-finished only once the targets are done: no background
 *   poison   the source closes midway; what is missing is poisoned (not with 0)
 *   destroy  the pager is destroyed midway */

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "internal.h"
#include "stress.h"

#define NR_TARGETS 2

#define CUT_AFTER 150	/* answers */

struct source {
	int fd;
	pthread_t thread;
	uint64_t seed;
	uint64_t answers;	/* close after so many, 0: when told */
	bool told;		/* it ended with CLOSE */
	_Atomic uint64_t nr_getv;
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

#define PAGE_WORDS (CRIUPY_PAGE_SIZE / sizeof(uint64_t))

/* All words of a page are its number. */
static void fill(uint64_t *pages, uint64_t address, uint64_t nr)
{
	for (uint64_t i = 0; i < nr * PAGE_WORDS; i++)
		pages[i] = address / CRIUPY_PAGE_SIZE + i / PAGE_WORDS + 1;
}

static bool send_run(struct source *source, uint64_t address, uint64_t nr_pages)
{
	uint64_t pages[16 * PAGE_WORDS];

	while (nr_pages) {
		uint64_t nr = min_u64(nr_pages, 16);

		fill(pages, address, nr);
		if (!send_all(source->fd, pages, nr << PAGE_SHIFT))
			return false;
		address += nr << PAGE_SHIFT;
		nr_pages -= nr;
	}
	return true;
}

#define NR_FILES 2
#define MOST_EXTENTS (NR_SLICES * SLICE_PAGES)

/* What pages files have of it, and where: nothing, all, or every other extent. */
static struct criupy_image *make_image(uint64_t id, uint64_t address, uint64_t nr_pages, bool remote, bool mixed,
				       uint64_t *seed)
{
	static uint64_t starts[MOST_EXTENTS], nrs[MOST_EXTENTS], data[MOST_EXTENTS];
	uint64_t page[PAGE_WORDS], next[NR_FILES] = { 0 };
	struct criupy_image *image;
	int files[NR_FILES];
	size_t nr = 0;

	for (int i = 0; i < NR_FILES; i++)
		CHECK((files[i] = memfd_create("pages", MFD_CLOEXEC)) >= 0);
	while (nr_pages) {
		size_t file = nr / 2 % NR_FILES;

		starts[nr] = address;
		nrs[nr] = mixed ? min_u64(nr_pages, 1 + random_below(seed, 40)) : nr_pages;
		if (mixed ? nr % 2 == 0 : remote) {
			data[nr] = CRIUPY_REMOTE;
		} else {
			data[nr] = (uint64_t)file << CRIUPY_FILE_SHIFT | next[file];
			next[file] += nrs[nr];
			for (uint64_t i = 0; i < nrs[nr]; i++) {
				fill(page, address + (i << PAGE_SHIFT), 1);
				CHECK(write(files[file], page, sizeof(page)) == sizeof(page));
			}
		}
		address += nrs[nr] << PAGE_SHIFT;
		nr_pages -= nrs[nr++];
	}
	CHECK(!criupy_image_create(&image, id, starts, nrs, data, NULL, nr));
	for (int i = 0; i < NR_FILES; i++) {
		CHECK(!next[i] || !criupy_image_attach(image, files[i]));
		close(files[i]);
	}
	return image;
}

static bool answer_get(struct source *source, struct criupy_frame *frame)
{
	uint8_t header[CRIUPY_FRAME_32];

	frame->cmd = CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16;
	frame->nr_pages = 1 + random_below(&source->seed, (uint32_t)frame->nr_pages);
	CHECK(!criupy_frame_encode(frame, header, sizeof(header)));
	return send_all(source->fd, header, sizeof(header)) && send_run(source, frame->vaddr, frame->nr_pages);
}

static bool answer_getv(struct source *source, struct criupy_frame *frame)
{
	uint64_t runs[CRIUPY_MAX_RUNS][2];
	uint8_t header[CRIUPY_FRAME_32];

	CHECK(frame->vaddr > 1 && frame->vaddr <= CRIUPY_MAX_RUNS);
	if (!receive_all(source->fd, runs, frame->vaddr * sizeof(runs[0])))
		return false;
	source->nr_getv++;
	frame->cmd |= CRIUPY_PE_PRESENT << 16;
	CHECK(!criupy_frame_encode(frame, header, sizeof(header)));
	if (!send_all(source->fd, header, sizeof(header)))
		return false;
	for (uint64_t i = 0; i < frame->vaddr; i++)
		if (!send_run(source, runs[i][0], runs[i][1]))
			return false;
	return true;
}

static void *serve(void *arg)
{
	static const int32_t status;
	struct source *source = arg;
	uint8_t header[CRIUPY_FRAME_32];
	struct criupy_frame frame;

	for (uint64_t nr = 1; receive_all(source->fd, header, sizeof(header)); nr++) {
		CHECK(!criupy_frame_decode(&frame, header, sizeof(header)));
		if (frame.cmd == CRIUPY_CMD_CLOSE) {
			CHECK(send_all(source->fd, &status, sizeof(status)));
			source->told = true;
			CHECK(!receive_all(source->fd, header, 1));
			break;
		}
		if (frame.cmd == CRIUPY_CMD_FINISHED)
			continue;
		CHECK(frame.cmd == CRIUPY_CMD_GET || frame.cmd == CRIUPY_CMD_GETV);
		CHECK(frame.nr_pages && frame.nr_pages <= 64);
		if (source->answers && nr > source->answers)
			break;
		if (!random_below(&source->seed, 4))
			usleep(random_below(&source->seed, 300));
		if (!(frame.cmd == CRIUPY_CMD_GET ? answer_get : answer_getv)(source, &frame))
			break;
	}
	close(source->fd);
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

static void set_lane(struct criupy_pager *pager, struct source *source, int lane, bool extended)
{
	int fd;

	connect_pair(&fd, &source->fd);
	CHECK(!criupy_pager_set_link(pager, fd, CRIUPY_FRAME_32, extended ? CRIUPY_LINK_EXTENDED : 0, lane,
				     NULL, NULL, 0));
	CHECK(!pthread_create(&source->thread, NULL, serve, source));
}

/* Make a lane again that its source has cut, as Python does. */
static void mend(struct criupy_pager *pager, struct source *sources, const struct criupy_stats *stats)
{
	const uint32_t states[] = { stats->link, stats->urgent_link };

	for (int lane = 0; lane < 2; lane++) {
		struct criupy_stats now;
		uint64_t told;

		if (states[lane] != CRIUPY_LINK_LOST || stats->phase >= CRIUPY_PHASE_CLOSING)
			continue;
		pthread_join(sources[lane].thread, NULL);
		told = stats->nr_obeyed + 2;
		CHECK(!criupy_pager_drop_link(pager, lane));
		sources[lane].answers = random_below(&sources[lane].seed, 2) ? CUT_AFTER : 0;
		set_lane(pager, &sources[lane], lane, true);
		do {
			usleep(100);
			criupy_pager_snapshot(pager, &now);
		} while (now.nr_obeyed < told);
	}
}

static void look(struct criupy_pager *pager, struct criupy_stats *stats)
{
	struct criupy_notice notice;

	while (criupy_pager_next_notice(pager, &notice))
		CHECK(notice.kind >= 1 && notice.kind <= CRIUPY_NOTICE_FEW_COPIERS);
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
		.link_timeout_ns = UINT64_MAX, .nr_buffers = 5, .request_pages = 32, .fault_around_pages = 4, .nr_copiers = 3,
	};
	const uint64_t nr_pages = NR_SLICES * SLICE_PAGES;
	uint64_t seed;
	struct target targets[NR_TARGETS];
	struct source sources[2] = { 0 };
	struct criupy_pager *pager;
	struct criupy_stats stats;
	int restore[2], nr_lanes, nr_left = NR_TARGETS;
	bool early, poison, destroy, mixed, ended = false;

	if (argc != 6)
		return 2;
	nr_lanes = atoi(argv[4]);
	mixed = strchr(argv[4], '+');
	seed = strtoull(argv[2], NULL, 0) * 2654435761u + 1;
	alarm(300); /* a guard: with it go the userfaultfds, and then the targets */
	early = !strcmp(argv[5], "early");
	poison = !strcmp(argv[5], "poison");
	destroy = !strcmp(argv[5], "destroy");
	for (int i = 0; i < nr_lanes; i++) {
		sources[i].seed = (strtoull(argv[2], NULL, 0) + (uint64_t)i) * 2654435761u + 1;
		sources[i].answers = poison ? 100 : nr_lanes > 1 ? CUT_AFTER : 0;
	}
	CHECK(!criupy_pager_create(&pager, &config));
	for (int i = 0; i < nr_lanes; i++)
		set_lane(pager, &sources[i], i, nr_lanes > 1);
	for (int i = 0; i < NR_TARGETS; i++) {
		struct criupy_image *image;
		uint64_t address;
		int uffd = start_target(&targets[i], argv[1], argv[2], argv[3], &address);

		image = make_image((uint64_t)targets[i].pid, address, nr_pages, nr_lanes, mixed, &seed);
		CHECK(!criupy_pager_add_task(pager, targets[i].pid, uffd, image));
	}
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, restore));
	CHECK(!criupy_pager_watch_restore(pager, restore[0]));
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
		if (pager && nr_lanes > 1 && !poison)
			mend(pager, sources, &stats);
		usleep(500);
	}
	if (early)
		CHECK(write(restore[1], "FTSR", 4) == 4);
	while (pager && !ended) {
		look(pager, &stats);
		if (nr_lanes > 1 && !poison)
			mend(pager, sources, &stats);
		ended = stats.phase == CRIUPY_PHASE_ENDED;
		usleep(500);
	}
	if (pager) {
		CHECK(!stats.pages_missing && !stats.nr_outstanding && !stats.nr_live);
		CHECK(stats.outcome == (poison ? CRIUPY_OUTCOME_GIVEN_UP : CRIUPY_OUTCOME_COMPLETE));
		fprintf(stderr, "%llu faults, %llu requests, %llu forks, %llu again, %llu dropped, %llu zero, %llu getv\n",
			(unsigned long long)stats.nr_faults, (unsigned long long)stats.nr_requests,
			(unsigned long long)stats.nr_forks, (unsigned long long)stats.nr_again,
			(unsigned long long)stats.pages_dropped, (unsigned long long)stats.pages_zero,
			(unsigned long long)sources[0].nr_getv);
	}
	criupy_pager_destroy(pager);
	for (int i = 0; i < nr_lanes; i++)
		pthread_join(sources[i].thread, NULL);
	/* An extended lane may be lost when all is there; then nobody is told here. */
	CHECK(sources[0].told || nr_lanes != 1 || poison || destroy);
	close(restore[1]);
	for (int i = 0; i < NR_TARGETS; i++)
		close(targets[i].orders);
	return 0;
}
