/* The page server under load, for sanitizers: clients on threads of their own
 * that ask, break off, break the rules and are cut, while the main thread looks
 * at the server as Python does.
 *
 * server_stress SEED ROUNDS */

#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "internal.h"

#define NR_CLIENTS 6
#define NR_EXTENTS 50
#define ID 7
#define BASE UINT64_C(0x7f0000000000)

static struct criupy_server *server;
static uint64_t starts[NR_EXTENTS], nr_pages[NR_EXTENTS], data_pages[NR_EXTENTS];
static _Atomic int nr_running = NR_CLIENTS;
static _Atomic uint64_t nr_connected;
static int rounds;

struct client {
	pthread_t thread;
	uint64_t seed;
	size_t frame_size;
	int fd;
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
		ssize_t got = read(fd, (char *)into + have, length - have);

		if (got <= 0)
			return false;
		have += (size_t)got;
	}
	return true;
}

static bool ask(struct client *c, uint32_t cmd, uint64_t nr, uint64_t vaddr, uint64_t id)
{
	struct criupy_frame frame = { cmd, nr, vaddr, id };
	uint8_t out[CRIUPY_FRAME_32];

	CHECK(!criupy_frame_encode(&frame, out, c->frame_size));
	return send(c->fd, out, c->frame_size, MSG_NOSIGNAL) == (ssize_t)c->frame_size;
}

/* Ask for some runs and look at what comes; false when the server has ended it. */
static bool fetch(struct client *c)
{
	static const uint64_t words = CRIUPY_PAGE_SIZE / sizeof(uint64_t);
	uint64_t page[CRIUPY_PAGE_SIZE / sizeof(uint64_t)];
	uint32_t nr = 1 + random_below(&c->seed, 8), extent[8], first[8];

	for (uint32_t i = 0; i < nr; i++) {
		extent[i] = random_below(&c->seed, NR_EXTENTS);
		first[i] = random_below(&c->seed, (uint32_t)nr_pages[extent[i]]);
		if (!ask(c, CRIUPY_CMD_GET, 1 + random_below(&c->seed, 60),
			 starts[extent[i]] + ((uint64_t)first[i] << PAGE_SHIFT), ID))
			return false;
	}
	for (uint32_t i = 0; i < nr; i++) {
		struct criupy_frame reply;
		uint8_t header[CRIUPY_FRAME_32];

		if (!receive_all(c->fd, header, c->frame_size))
			return false;
		CHECK(!criupy_frame_decode(&reply, header, c->frame_size));
		CHECK(reply.vaddr == starts[extent[i]] + ((uint64_t)first[i] << PAGE_SHIFT));
		CHECK(reply.nr_pages && reply.nr_pages <= nr_pages[extent[i]] - first[i]);
		for (uint64_t n = 0; n < reply.nr_pages; n++) {
			if (!receive_all(c->fd, page, sizeof(page)))
				return false;
			CHECK(page[0] == data_pages[extent[i]] + first[i] + n + 1 && page[words - 1] == page[0]);
		}
	}
	return true;
}

static void finish(struct client *c)
{
	const struct linger reset = { .l_onoff = 1, .l_linger = 0 };
	uint8_t waste[CRIUPY_FRAME_32] = { 0x77 };

	switch (random_below(&c->seed, 6)) {
	case 0:
		if (ask(c, CRIUPY_CMD_CLOSE, 0, 0, 0))
			(void)receive_all(c->fd, waste, sizeof(int32_t));
		break;
	case 1:
		(void)setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
		break;
	case 2:
		(void)ask(c, CRIUPY_CMD_GET, 1, BASE - CRIUPY_PAGE_SIZE, ID);
		(void)receive_all(c->fd, waste, 1);
		break;
	case 3:
		(void)send(c->fd, waste, random_below(&c->seed, sizeof(waste)), MSG_NOSIGNAL);
		break;
	case 4:
		/* Ask for much, and read nothing. */
		for (int i = 0; i < 200; i++)
			if (!ask(c, CRIUPY_CMD_GET, 60, starts[0], ID))
				break;
		break;
	}
	close(c->fd);
}

static void *work(void *arg)
{
	struct client *c = arg;

	for (int i = 0; i < rounds; i++) {
		uint64_t serial;
		int theirs;

		connect_pair(&c->fd, &theirs);
		c->frame_size = random_below(&c->seed, 2) ? CRIUPY_FRAME_24 : CRIUPY_FRAME_32;
		CHECK(!criupy_server_serve(server, theirs, NULL, &serial));
		nr_connected++;
		for (uint32_t n = random_below(&c->seed, 10); n; n--)
			if (!fetch(c))
				break;
		finish(c);
	}
	nr_running--;
	return NULL;
}

int main(int argc, char **argv)
{
	const struct criupy_server_config config = { .stall_timeout_ns = UINT64_C(60000000000) };
	struct client clients[NR_CLIENTS];
	struct criupy_served served[4];
	struct criupy_image *image;
	char path[] = "/tmp/server_stress-XXXXXX";
	uint64_t seed, next = BASE, nr_ended = 0, total = 0, serial, page[CRIUPY_PAGE_SIZE / sizeof(uint64_t)];
	int file, ours, theirs;

	if (argc != 3)
		return 2;
	alarm(300);
	seed = strtoull(argv[1], NULL, 0) * 2654435761u + 1;
	rounds = atoi(argv[2]);
	file = mkstemp(path);
	CHECK(file >= 0 && !unlink(path));
	for (int i = 0; i < NR_EXTENTS; i++) {
		next += (uint64_t)random_below(&seed, 3) << PAGE_SHIFT;
		starts[i] = next;
		nr_pages[i] = 1 + random_below(&seed, 50);
		data_pages[i] = total;
		next += nr_pages[i] << PAGE_SHIFT;
		total += nr_pages[i];
	}
	for (uint64_t n = 0; n < total; n++) {
		for (size_t i = 0; i < sizeof(page) / sizeof(page[0]); i++)
			page[i] = n + 1;
		CHECK(write(file, page, sizeof(page)) == sizeof(page));
	}
	CHECK(!criupy_server_create(&server, &config));
	CHECK(!criupy_image_create(&image, ID, starts, nr_pages, data_pages, NULL, NR_EXTENTS));
	CHECK(!criupy_server_add_image(server, image, file));
	for (int i = 0; i < NR_CLIENTS; i++) {
		clients[i].seed = seed + (uint64_t)i * 7919 + 1;
		CHECK(!pthread_create(&clients[i].thread, NULL, work, &clients[i]));
	}
	while (nr_running || nr_ended < nr_connected) {
		while (criupy_server_next_ended(server, &served[0]) == 1) {
			CHECK(served[0].ended && served[0].reason != CRIUPY_SERVED_DATA);
			CHECK(served[0].reason != CRIUPY_SERVED_ERROR && served[0].reason != CRIUPY_SERVED_STALLED);
			nr_ended++;
		}
		if (criupy_server_connections(server, served, 4) > 0 && !random_below(&seed, 8))
			CHECK(!criupy_server_cut(server, served[0].serial));
		usleep(500);
	}
	for (int i = 0; i < NR_CLIENTS; i++)
		pthread_join(clients[i].thread, NULL);
	connect_pair(&ours, &theirs);
	CHECK(!criupy_server_serve(server, theirs, NULL, &serial));
	criupy_server_destroy(server);
	close(ours);
	fprintf(stderr, "%llu connections\n", (unsigned long long)nr_ended);
	return 0;
}
