/* The bytes of a connection: a blocking TCP socket with timeouts. */

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
		return connection_fail(c, CRIUPY_SERVED_RESET, 0);
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

int stream_init(struct connection *c)
{
	return set_timeout(c, SO_SNDTIMEO, c->server->config.stall_timeout_ns);
}

int stream_set_timeout(struct connection *c, uint64_t ns)
{
	if (ns == c->timeout_ns)
		return 0;
	c->timeout_ns = ns;
	return set_timeout(c, SO_RCVTIMEO, ns);
}

ssize_t stream_receive(struct connection *c, void *into, size_t room)
{
	ssize_t got;

	do
		got = recv(c->fd, into, room, 0);
	while (got < 0 && errno == EINTR);
	return got < 0 ? fail(c, errno) : got;
}

int stream_send(struct connection *c, const void *data, size_t length, bool more)
{
	const uint8_t *from = data;

	while (length) {
		ssize_t sent = send(c->fd, from, length, MSG_NOSIGNAL | (more ? MSG_MORE : 0));

		if (sent >= 0) {
			from += sent;
			length -= (size_t)sent;
		} else if (errno != EINTR) {
			return fail(c, errno);
		}
	}
	return 0;
}

int stream_send_file(struct connection *c, int fd, uint64_t start, size_t length)
{
	off_t offset = (off_t)start;

	while (length) {
		ssize_t sent = sendfile(c->fd, fd, &offset, length);

		if (sent > 0)
			length -= (size_t)sent;
		else if (!sent)	/* the file has shrunk */
			return connection_fail(c, CRIUPY_SERVED_DATA, ENODATA);
		else if (errno == EIO)
			return connection_fail(c, CRIUPY_SERVED_DATA, EIO);
		else if (errno != EINTR)
			return fail(c, errno);
	}
	return 0;
}
