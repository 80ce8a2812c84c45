/* The bytes of a connection: a blocking TCP socket with timeouts, or a transport
 * over one that does not block and is waited for here. */

#include <poll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "server.h"

static int fail(struct connection *c, int error)
{
	switch (error) {
	case EAGAIN:
		return connection_fail(c, CRIUPY_SERVED_STALLED, 0);
	case EPIPE:
	case ECONNRESET:
	case ETIMEDOUT:		/* by the keepalive; these are the network's, too */
	case EHOSTUNREACH:
	case ENETUNREACH:
	case EHOSTDOWN:
	case ENETDOWN:
		return connection_fail(c, CRIUPY_SERVED_RESET, error);
	case EBADMSG:
		return connection_fail(c, CRIUPY_SERVED_TRANSPORT, 0);
	default:
		return connection_fail(c, CRIUPY_SERVED_ERROR, error);
	}
}

static int set_timeout(struct connection *c, int option, uint64_t ns)
{
	/* 0 would be "for ever". */
	uint64_t us = ns ? max_u64(ns / 1000, 1) : 0;
	struct timeval timeout = {
		.tv_sec = (time_t)(us / 1000000),
		.tv_usec = (suseconds_t)(us % 1000000),
	};

	return setsockopt(c->fd, SOL_SOCKET, option, &timeout, sizeof(timeout)) < 0 ? fail(c, errno) : 0;
}

/* ---- over a transport ---------------------------------------------------------------- */

/* Wait for what the transport waits for, since when it does and at most so long
 * (0: for ever). */
static int wait_for(struct connection *c, uint64_t since, uint64_t ns)
{
	struct pollfd socket = { .fd = c->fd, .events = (short)c->transport->events };
	uint64_t passed = server_now_ns() - since;
	struct timespec left = { 0 };
	int nr;

	if (ns && passed >= ns)
		return fail(c, EAGAIN);
	if (ns)
		left = (struct timespec){
			.tv_sec = (time_t)((ns - passed) / 1000000000),
			.tv_nsec = (long)((ns - passed) % 1000000000),
		};
	nr = ppoll(&socket, 1, ns ? &left : NULL, NULL);
	return nr < 0 && errno != EINTR ? fail(c, errno) : 0;
}

static ssize_t transport_receive(struct connection *c, void *into, size_t room)
{
	uint64_t since = server_now_ns();
	int64_t got;

	while ((got = c->transport->receive(c->transport, into, room)) == -EAGAIN)
		if (wait_for(c, since, c->timeout_ns) < 0)
			return -1;
	return got < 0 ? fail(c, (int)-got) : (ssize_t)got;
}

static int transport_send(struct connection *c, const uint8_t *from, size_t length)
{
	uint64_t since = server_now_ns(), gone = c->transport->sent;

	while (length) {
		int64_t sent = c->transport->send(c->transport, from, length);

		if (sent >= 0) {
			from += sent;
			length -= (size_t)sent;
			since = server_now_ns();
			continue;
		}
		if (sent != -EAGAIN)
			return fail(c, (int)-sent);
		if (c->transport->sent != gone) {
			gone = c->transport->sent;
			since = server_now_ns();
		}
		if (wait_for(c, since, c->server->config.stall_timeout_ns) < 0)
			return -1;
	}
	return 0;
}

int stream_flush(struct connection *c)
{
	uint64_t since = server_now_ns(), gone;
	int result;

	if (!c->transport)
		return 0;
	gone = c->transport->sent;
	while ((result = c->transport->flush(c->transport)) == -EAGAIN) {
		if (c->transport->sent != gone) {
			gone = c->transport->sent;
			since = server_now_ns();
		}
		if (wait_for(c, since, c->server->config.stall_timeout_ns) < 0)
			return -1;
	}
	return result < 0 ? fail(c, -result) : 0;
}

void stream_end(struct connection *c)
{
	uint32_t reason = c->counted.reason;

	if (!c->transport)
		return;
	if (!c->cut && (reason == CRIUPY_SERVED_CLOSED || reason == CRIUPY_SERVED_EOF))
		(void)c->transport->close_notify(c->transport);
	if (reason == CRIUPY_SERVED_EOF || reason == CRIUPY_SERVED_TRANSPORT)
		c->transport->describe(c->transport, c->counted.fault, sizeof(c->counted.fault));
	c->transport->destroy(c->transport);
	c->transport = NULL;
}

/* ---- either way ------------------------------------------------------------------------ */

int stream_init(struct connection *c)
{
	if (c->transport)
		return 0;
	return set_timeout(c, SO_SNDTIMEO, c->server->config.stall_timeout_ns);
}

int stream_set_timeout(struct connection *c, uint64_t ns)
{
	if (ns == c->timeout_ns)
		return 0;
	c->timeout_ns = ns;
	if (c->transport)
		return 0;
	return set_timeout(c, SO_RCVTIMEO, ns);
}

ssize_t stream_receive(struct connection *c, void *into, size_t room)
{
	ssize_t got;

	if (c->transport)
		return transport_receive(c, into, room);
	do
		got = recv(c->fd, into, room, 0);
	while (got < 0 && errno == EINTR);
	return got < 0 ? fail(c, errno) : got;
}

/* A call that began then did a part: it did so at once, and the rest was waited
 * for in vain. The next would wait as long again. */
static bool ended_by_timeout(const struct connection *c, uint64_t since)
{
	return server_now_ns() - since >= c->server->config.stall_timeout_ns;
}

int stream_send(struct connection *c, const void *data, size_t length, bool more)
{
	const uint8_t *from = data;

	if (c->transport)
		return transport_send(c, from, length) < 0 || (!more && stream_flush(c) < 0) ? -1 : 0;
	while (length) {
		uint64_t since = server_now_ns();
		ssize_t sent = send(c->fd, from, length, MSG_NOSIGNAL | (more ? MSG_MORE : 0));

		if (sent < 0 && errno != EINTR)
			return fail(c, errno);
		if (sent < 0)
			continue;
		from += sent;
		length -= (size_t)sent;
		if (length && ended_by_timeout(c, since))
			return fail(c, EAGAIN);
	}
	return 0;
}

int stream_send_file(struct connection *c, const struct served_image *served, uint64_t start, size_t length)
{
	off_t offset = (off_t)start;

	while (c->transport && length) {
		size_t some = min_u64(length, SERVER_OUT);

		if (read_pages(c, served->fd, start, c->out, some) < 0 || check_unchanged(c, served) < 0 ||
		    stream_send(c, c->out, some, true) < 0)
			return -1;
		start += some;
		length -= some;
	}
	if (!length)
		return 0;
	while (length) {
		uint64_t since = server_now_ns();
		ssize_t sent = sendfile(c->fd, served->fd, &offset, length);

		if (sent > 0) {
			length -= (size_t)sent;
			if (length && ended_by_timeout(c, since))
				return fail(c, EAGAIN);
		} else if (!sent) { /* the file has shrunk */
			return connection_fail(c, CRIUPY_SERVED_DATA, ENODATA);
		} else if (errno == EIO) {
			return connection_fail(c, CRIUPY_SERVED_DATA, EIO);
		} else if (errno != EINTR) {
			return fail(c, errno);
		}
	}
	return check_unchanged(c, served);
}
