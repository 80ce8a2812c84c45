/* The fetcher of a relay under load, for sanitizers: a source on a thread of its own
 * that may die, clients of a page server that ask, break off and are cut, and an end
 * of any kind at any time.
 *
 * upstream_stress SEED ROUNDS */

#include <arpa/inet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "internal.h"

#define NR_CLIENTS 4
#define NR_EXTENTS 20
#define ID 7
#define BASE UINT64_C(0x7f0000000000)
#define WORDS (CRIUPY_PAGE_SIZE / sizeof(uint64_t))

static uint64_t starts[NR_EXTENTS], nr_pages[NR_EXTENTS], data_pages[NR_EXTENTS];

struct party {
	pthread_t thread;
	uint64_t seed;
	size_t frame_size;
	int fd;
	int64_t dies_after;	/* the source, so many answers; never if it is negative */
	_Atomic bool done;
};

static uint32_t random_below(uint64_t *seed, uint32_t limit)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return (uint32_t)(*seed >> 11) % limit;
}

static void connect_pair(int *ours, int *theirs)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	*ours = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(listener >= 0 && *ours >= 0);
	CHECK(!bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&address, &length));
	CHECK(!connect(*ours, (struct sockaddr *)&address, length));
	*theirs = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	CHECK(*theirs >= 0);
	close(listener);
}

static bool receive_all(int fd, void *into, size_t length)
{
	for (size_t have = 0; have < length;) {
		ssize_t got = recv(fd, (char *)into + have, length - have, 0);

		if (got <= 0)
			return false;
		have += (size_t)got;
	}
	return true;
}

static bool send_all(int fd, const void *from, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t sent = send(fd, (const char *)from + done, length - done, MSG_NOSIGNAL);

		if (sent <= 0)
			return false;
		done += (size_t)sent;
	}
	return true;
}

static bool say(const struct party *p, struct criupy_frame frame)
{
	uint8_t out[CRIUPY_FRAME_32];

	CHECK(!criupy_frame_encode(&frame, out, p->frame_size));
	return send_all(p->fd, out, p->frame_size);
}

static bool hear(const struct party *p, struct criupy_frame *frame)
{
	uint8_t in[CRIUPY_FRAME_32];

	return receive_all(p->fd, in, p->frame_size) && !criupy_frame_decode(frame, in, p->frame_size);
}

/* ---- the source ---------------------------------------------------------------------- */

static bool answer(struct party *p, struct criupy_frame get)
{
	uint64_t page[WORDS];
	size_t i = 0;

	while (i < NR_EXTENTS && (get.vaddr < starts[i] || get.vaddr >= starts[i] + (nr_pages[i] << PAGE_SHIFT)))
		i++;
	CHECK(i < NR_EXTENTS && get.dst_id == ID && get.nr_pages && get.nr_pages <= 256);
	CHECK(get.vaddr + (get.nr_pages << PAGE_SHIFT) <= starts[i] + (nr_pages[i] << PAGE_SHIFT));
	if (!random_below(&p->seed, 4))
		get.nr_pages = 1 + random_below(&p->seed, (uint32_t)get.nr_pages);
	get.cmd = CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16;
	if (!say(p, get))
		return false;
	for (uint64_t n = 0; n < get.nr_pages; n++) {
		for (size_t word = 0; word < WORDS; word++)
			page[word] = data_pages[i] + ((get.vaddr - starts[i]) >> PAGE_SHIFT) + n + 1;
		if (!send_all(p->fd, page, sizeof(page)))
			return false;
	}
	return true;
}

static void *serve(void *arg)
{
	struct party *p = arg;
	struct criupy_frame frame;
	int32_t status = 0;

	while (p->dies_after-- && hear(p, &frame)) {
		if (frame.cmd == CRIUPY_CMD_CLOSE) {
			(void)send_all(p->fd, &status, sizeof(status));
			(void)receive_all(p->fd, &status, 1);
			break;
		}
		CHECK(frame.cmd == CRIUPY_CMD_GET);
		if (!answer(p, frame))
			break;
	}
	close(p->fd);
	return NULL;
}

/* ---- a client ---------------------------------------------------------------------------- */

static bool fetch(struct party *p)
{
	uint32_t nr = 1 + random_below(&p->seed, 6), extent[6], first[6];

	for (uint32_t i = 0; i < nr; i++) {
		extent[i] = random_below(&p->seed, NR_EXTENTS);
		first[i] = random_below(&p->seed, (uint32_t)nr_pages[extent[i]]);
		if (!say(p, (struct criupy_frame){
				CRIUPY_CMD_GET, 1 + random_below(&p->seed, random_below(&p->seed, 2) ? 3 : 90),
				starts[extent[i]] + ((uint64_t)first[i] << PAGE_SHIFT), ID }))
			return false;
	}
	for (uint32_t i = 0; i < nr; i++) {
		struct criupy_frame reply;
		uint64_t page[WORDS];

		if (!hear(p, &reply))
			return false;
		CHECK(reply.vaddr == starts[extent[i]] + ((uint64_t)first[i] << PAGE_SHIFT));
		CHECK(reply.nr_pages && reply.nr_pages <= nr_pages[extent[i]] - first[i]);
		for (uint64_t n = 0; n < reply.nr_pages; n++) {
			if (!receive_all(p->fd, page, sizeof(page)))
				return false;
			for (size_t word = 0; word < WORDS; word++)
				CHECK(page[word] == data_pages[extent[i]] + first[i] + n + 1);
		}
	}
	return true;
}

static void *ask(void *arg)
{
	struct party *p = arg;

	for (uint32_t n = 5 + random_below(&p->seed, 30); n; n--)
		if (!fetch(p))
			break;
	if (random_below(&p->seed, 2))
		(void)say(p, (struct criupy_frame){ CRIUPY_CMD_GET, 80, starts[0], ID });
	close(p->fd);
	p->done = true;
	return NULL;
}

/* ---- rounds -------------------------------------------------------------------------------- */

static void round_of(uint64_t *seed)
{
	const struct criupy_server_config server_config = { .stall_timeout_ns = UINT64_C(60000000000) };
	struct criupy_upstream_config config = { .link_timeout_ns = UINT64_C(60000000000) };
	struct party source = { .dies_after = -1 }, clients[NR_CLIENTS] = { 0 };
	struct criupy_upstream *upstream;
	struct criupy_upstream_stats stats;
	struct criupy_served served;
	struct criupy_server *server;
	struct criupy_image *image;
	uint32_t how = random_below(seed, 8), nr_done;
	uint64_t serial;
	int file = memfd_create("pages", MFD_CLOEXEC), fd;

	CHECK(file >= 0);
	if (random_below(seed, 3))
		config.cache_pages = 1 + random_below(seed, 200);
	if (!random_below(seed, 4))
		source.dies_after = random_below(seed, 30);
	CHECK(!criupy_server_create(&server, &server_config));
	CHECK(!criupy_upstream_create(&upstream, &config));
	CHECK(!criupy_image_create(&image, ID, starts, nr_pages, data_pages, NULL, NR_EXTENTS));
	CHECK(!criupy_upstream_add_image(upstream, image, file));
	CHECK(!criupy_server_add_upstream(server, upstream));
	source.frame_size = random_below(seed, 2) ? CRIUPY_FRAME_24 : CRIUPY_FRAME_32;
	source.seed = ++*seed;
	connect_pair(&fd, &source.fd);
	CHECK(!pthread_create(&source.thread, NULL, serve, &source));
	for (int i = 0; i < NR_CLIENTS; i++) {
		int theirs;

		clients[i].seed = ++*seed;
		clients[i].frame_size = random_below(seed, 2) ? CRIUPY_FRAME_24 : CRIUPY_FRAME_32;
		connect_pair(&clients[i].fd, &theirs);
		CHECK(!criupy_server_serve(server, theirs, NULL, &serial));
		CHECK(!pthread_create(&clients[i].thread, NULL, ask, &clients[i]));
		if (i == NR_CLIENTS / 2)
			CHECK(!criupy_upstream_start(upstream, fd, (int)source.frame_size));
	}
	do {
		criupy_upstream_snapshot(upstream, &stats);
		CHECK(!config.cache_pages || stats.pages_kept <= config.cache_pages);
		CHECK(!stats.disk_error && stats.error != EPROTO);
		while (criupy_server_next_ended(server, &served))
			CHECK(served.reason < CRIUPY_SERVED_COMMAND && served.reason != CRIUPY_SERVED_DATA &&
			      served.reason != CRIUPY_SERVED_ERROR && served.reason != CRIUPY_SERVED_DISK);
		if (!random_below(seed, 40))
			CHECK(!criupy_server_cut(server, random_below(seed, NR_CLIENTS)));
		if (how < 4 && !random_below(seed, 10))
			break;
		usleep(200);
		nr_done = 0;
		for (int i = 0; i < NR_CLIENTS; i++)
			nr_done += clients[i].done;
	} while (nr_done < NR_CLIENTS);
	switch (how) {
	case 0:
	case 4:
		CHECK(!criupy_upstream_close(upstream));
		break;
	case 1:
	case 5:
		CHECK(!criupy_upstream_reset(upstream));
		break;
	case 2:
		criupy_server_destroy(server);
		server = NULL;
		break;
	}
	if (random_below(seed, 2))
		usleep(random_below(seed, 2000));
	criupy_upstream_destroy(upstream);
	criupy_server_destroy(server);
	for (int i = 0; i < NR_CLIENTS; i++)
		pthread_join(clients[i].thread, NULL);
	pthread_join(source.thread, NULL);
}

int main(int argc, char **argv)
{
	uint64_t seed, next = BASE, total = 0;

	if (argc != 3)
		return 2;
	alarm(300);
	seed = strtoull(argv[1], NULL, 0) * 2654435761u + 1;
	for (int i = 0; i < NR_EXTENTS; i++) {
		next += (uint64_t)random_below(&seed, 3) << PAGE_SHIFT;
		starts[i] = next;
		nr_pages[i] = 1 + random_below(&seed, 100);
		data_pages[i] = total;
		next += nr_pages[i] << PAGE_SHIFT;
		total += nr_pages[i];
	}
	for (int rounds = atoi(argv[2]); rounds; rounds--)
		round_of(&seed);
	return 0;
}
