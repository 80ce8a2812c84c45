/* TCP over loopback, a client of a page source, and the two ends of a link. */

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include "limits.h"

#define NR_ASKED ((size_t)5000)
#define SENT_AT_ONCE MIB
#define BUFFER (4 * MIB)

/* ---- sockets ----------------------------------------------------------------------- */

static int listen_on_loopback(struct sockaddr_in *address)
{
	socklen_t length = sizeof(*address);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	*address = (struct sockaddr_in) { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	CHECK(fd >= 0 && !bind(fd, (struct sockaddr *)address, length) && !listen(fd, 16));
	CHECK(!getsockname(fd, (struct sockaddr *)address, &length));
	return fd;
}

static void send_at_once(int fd)
{
	int yes = 1;

	CHECK(!setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes)));
}

static int connect_address(const struct sockaddr_in *address)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	CHECK(fd >= 0 && !connect(fd, (const struct sockaddr *)address, sizeof(*address)));
	send_at_once(fd);
	return fd;
}

void connect_pair(int pair[2])
{
	struct sockaddr_in address;
	int listener = listen_on_loopback(&address);

	pair[0] = connect_address(&address);
	pair[1] = accept(listener, NULL, NULL);
	CHECK(pair[1] >= 0);
	send_at_once(pair[1]);
	close(listener);
}

int connect_to(const char *port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

	address.sin_port = htons((uint16_t)atoi(port));
	return connect_address(&address);
}

void receive_all(int fd, void *into, size_t length)
{
	for (size_t have = 0; have < length;) {
		ssize_t got = recv(fd, (char *)into + have, length - have, 0);

		CHECK(got > 0);
		have += (size_t)got;
	}
}

void send_all(int fd, const void *data, size_t length)
{
	for (size_t sent = 0; sent < length;) {
		ssize_t ret = send(fd, (const char *)data + sent, length - sent, MSG_NOSIGNAL);

		CHECK(ret > 0);
		sent += (size_t)ret;
	}
}

/* ---- one stream, and one page at a time ---------------------------------------------- */

struct sending {
	int fd;
	uint64_t length;
};

static void *send_stream(void *argument)
{
	const struct sending *s = argument;
	uint8_t *data = map_memory(SENT_AT_ONCE);

	memset(data, 1, SENT_AT_ONCE);
	for (uint64_t left = s->length; left;) {
		size_t some = left < SENT_AT_ONCE ? left : SENT_AT_ONCE;

		send_all(s->fd, data, some);
		left -= some;
	}
	munmap(data, SENT_AT_ONCE);
	return NULL;
}

static double thread_seconds(void)
{
	struct rusage usage;

	CHECK(!getrusage(RUSAGE_THREAD, &usage));
	return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
	       (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void measure_stream(size_t read_size)
{
	struct sending sending = { .length = 512 * MIB };
	uint8_t *buffer = map_memory(BUFFER);
	uint64_t begin, got = 0;
	pthread_t thread;
	double cpu;
	int pair[2];

	memset(buffer, 1, BUFFER);
	connect_pair(pair);
	sending.fd = pair[1];
	begin = now_ns();
	cpu = thread_seconds();
	thread = start_thread(send_stream, &sending);
	while (got < sending.length) {
		ssize_t some = recv(pair[0], buffer, read_size, 0);

		CHECK(some > 0);
		got += (uint64_t)some;
	}
	report_sized("stream", read_size, "GB/s", (double)got / (double)(now_ns() - begin));
	report_sized("stream CPU", read_size, "s/GiB", (thread_seconds() - cpu) * 1024 * (double)MIB / (double)got);
	join_thread(thread);
	close(pair[0]);
	close(pair[1]);
	munmap(buffer, BUFFER);
}

struct answering {
	int fd;
	int core;
	bool spins;
};

/* The next length bytes, asleep or looking again and again. */
static void await(int fd, uint8_t *into, size_t length, bool spins)
{
	for (size_t have = 0; have < length;) {
		ssize_t got = recv(fd, into + have, length - have, spins ? MSG_DONTWAIT : 0);

		CHECK(got > 0 || (got < 0 && errno == EAGAIN));
		have += got > 0 ? (size_t)got : 0;
	}
}

static void *answer_pages(void *argument)
{
	const struct answering *a = argument;
	uint8_t request[CRIUPY_FRAME_32], reply[CRIUPY_FRAME_32 + CRIUPY_PAGE_SIZE] = { 0 };

	stay_on(a->core);
	for (size_t i = 0; i < NR_ASKED; i++) {
		await(a->fd, request, sizeof(request), a->spins);
		send_all(a->fd, reply, sizeof(reply));
	}
	return NULL;
}

static void measure_request(const char *key, int core, int other_core, bool spins)
{
	struct answering answering = { .core = other_core, .spins = spins };
	uint8_t request[CRIUPY_FRAME_32] = { 0 }, reply[CRIUPY_FRAME_32 + CRIUPY_PAGE_SIZE];
	static uint64_t times[NR_ASKED];
	pthread_t thread;
	int pair[2];

	connect_pair(pair);
	answering.fd = pair[1];
	stay_on(core);
	thread = start_thread(answer_pages, &answering);
	for (size_t i = 0; i < NR_ASKED; i++) {
		uint64_t begin = now_ns();

		send_all(pair[0], request, sizeof(request));
		await(pair[0], reply, sizeof(reply), spins);
		times[i] = now_ns() - begin;
	}
	join_thread(thread);
	stay_on(-1);
	report(key, "us", (double)middle(times, NR_ASKED) / 1000);
	close(pair[0]);
	close(pair[1]);
}

void measure_net(void)
{
	static const size_t sizes[] = { 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB };

	for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++)
		measure_stream(sizes[i]);
	measure_request("request", -1, -1, false);
	measure_request("request, one core", 0, 0, false);
	if (nr_cores() < 2)
		return;
	measure_request("request, two cores", 0, 1, false);
	measure_request("request, spinning", 0, 1, true);
}

/* ---- what a source delivers ------------------------------------------------------------ */

struct asking {
	int fd;
	size_t frame_size;
	struct criupy_frame next;	/* what is asked for next */
	uint64_t left;			/* pages not asked for yet */
	uint64_t each;
	uint64_t window;
	uint64_t gap;			/* pages left out behind each request */
	uint64_t outstanding;		/* pages */
};

/* Ask for as much as the window has room for, by one call. */
static void ask(struct asking *a)
{
	uint8_t frames[1024 * CRIUPY_FRAME_32];
	size_t length = 0;

	while (a->left && a->outstanding + a->each <= a->window && length + CRIUPY_FRAME_32 <= sizeof(frames)) {
		a->next.nr_pages = a->left < a->each ? a->left : a->each;
		CHECK(!criupy_frame_encode(&a->next, frames + length, a->frame_size));
		length += a->frame_size;
		a->next.vaddr += (a->next.nr_pages + a->gap) * PAGE;
		a->left -= a->next.nr_pages;
		a->outstanding += a->next.nr_pages;
	}
	if (length)
		send_all(a->fd, frames, length);
}

int fetch(char **words)
{
	struct asking a = {
		.fd = connect_to(words[0]),
		.frame_size = strtoul(words[1], NULL, 10),
		.next = { .cmd = CRIUPY_CMD_GET, .dst_id = strtoul(words[2], NULL, 10),
			  .vaddr = strtoul(words[3], NULL, 10) },
		.left = strtoul(words[4], NULL, 10),
		.each = strtoul(words[5], NULL, 10),
		.window = strtoul(words[6], NULL, 10),
		.gap = strtoul(words[7], NULL, 10),
	};
	struct linger reset = { .l_onoff = 1 };
	uint64_t pages = a.left, expected = a.next.vaddr, skip = 0, begin;
	uint8_t *buffer = map_memory(BUFFER);
	size_t have = 0;

	memset(buffer, 1, BUFFER);
	begin = now_ns();
	ask(&a);
	while (a.outstanding || skip) {
		ssize_t got = recv(a.fd, buffer + have, BUFFER - have, 0);
		size_t at = 0;

		CHECK(got > 0);
		have += (size_t)got;
		while (at < have) {
			struct criupy_frame reply;
			size_t some = skip < have - at ? skip : have - at;

			at += some;
			skip -= some;
			if (skip || have - at < a.frame_size)
				break;
			CHECK(!criupy_frame_decode(&reply, buffer + at, a.frame_size));
			/* No source shortens what lies in one entry, and a measurement asks for nothing else. */
			CHECK(reply.cmd == (CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16));
			CHECK(reply.vaddr == expected && reply.nr_pages <= a.outstanding);
			expected += (reply.nr_pages + a.gap) * PAGE;
			a.outstanding -= reply.nr_pages;
			skip = reply.nr_pages * PAGE;
			at += a.frame_size;
		}
		memmove(buffer, buffer + at, have - at);
		have -= at;
		ask(&a);
	}
	report("fetch", "MB/s", (double)(pages * PAGE) / (double)(now_ns() - begin) * 1000);
	/* A live source goes on after a reset. */
	CHECK(!setsockopt(a.fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)));
	close(a.fd);
	return 0;
}

/* ---- the two ends of a link ------------------------------------------------------------- */

/* Whoever connects says how many bytes it wants; with 0, everything comes back to it. */
static void *serve_one(void *argument)
{
	struct sending sending = { .fd = (int)(intptr_t)argument };
	uint8_t echoed[4096];
	ssize_t got;

	send_at_once(sending.fd);
	receive_all(sending.fd, &sending.length, sizeof(sending.length));
	if (sending.length)
		send_stream(&sending);
	while ((got = recv(sending.fd, echoed, sizeof(echoed), 0)) > 0)
		send_all(sending.fd, echoed, (size_t)got);
	close(sending.fd);
	return NULL;
}

int serve(void)
{
	struct sockaddr_in address;
	int listener = listen_on_loopback(&address), fd;

	printf("%d\n", ntohs(address.sin_port));
	fflush(stdout);
	while ((fd = accept(listener, NULL, NULL)) >= 0)
		CHECK(!pthread_detach(start_thread(serve_one, (void *)(intptr_t)fd)));
	return 1;
}

int round_trip(char **words)
{
	size_t nr = strtoul(words[1], NULL, 10);
	uint64_t *times = calloc(nr, sizeof(*times)), nothing = 0;
	int fd = connect_to(words[0]);
	uint8_t byte = 1;

	CHECK(times);
	send_all(fd, &nothing, sizeof(nothing));
	for (size_t i = 0; i < nr; i++) {
		uint64_t begin = now_ns();

		send_all(fd, &byte, 1);
		receive_all(fd, &byte, 1);
		times[i] = now_ns() - begin;
	}
	report("round trip", "ms", (double)middle(times, nr) / 1e6);
	close(fd);
	free(times);
	return 0;
}

int stream(char **words)
{
	uint64_t length = strtoul(words[1], NULL, 10), got = 1, begin;
	uint8_t *buffer = map_memory(MIB);
	int fd = connect_to(words[0]);

	memset(buffer, 1, MIB);
	send_all(fd, &length, sizeof(length));
	receive_all(fd, buffer, 1); /* the way there is no part of the bandwidth */
	begin = now_ns();
	while (got < length) {
		ssize_t some = recv(fd, buffer, MIB, 0);

		CHECK(some > 0);
		got += (uint64_t)some;
	}
	report("stream", "MB/s", (double)got / (double)(now_ns() - begin) * 1000);
	close(fd);
	return 0;
}
