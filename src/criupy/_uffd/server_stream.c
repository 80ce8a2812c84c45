/* The bytes of a connection: a socket that does not block, or a transport over
 * one, and how long it is waited for.
 *
 * Who takes something is not given up, however slow it is. Room in the socket
 * does not tell: there is none before a third of its buffer has gone, which takes
 * a slow peer longer than anybody waits for a silent one. What it has
 * acknowledged does. */

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>

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

/* ---- waiting --------------------------------------------------------------------------- */

/* Wait for events, since when that is done and at most so long (0: for ever). */
static int wait_for(struct connection *c, int events, uint64_t since, uint64_t ns)
{
	struct pollfd socket = { .fd = c->fd, .events = (short)events };
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

/* What the peer has not acknowledged yet, or 0. */
static int unacknowledged(const struct connection *c)
{
	int bytes = 0;

	return ioctl(c->fd, SIOCOUTQ, &bytes) < 0 ? 0 : bytes;
}

/* Since when a peer that is to take something has taken nothing, and what was
 * left then; all zero while it has not been waited for. */
struct patience {
	uint64_t since;
	int rest;
};

static int wait_to_send(struct connection *c, int events, struct patience *patience)
{
	uint64_t most = c->server->config.stall_timeout_ns, now = server_now_ns();

	if (!patience->since || now - patience->since >= most) {
		int rest = unacknowledged(c);

		if (patience->since && rest >= patience->rest)
			return fail(c, EAGAIN);
		*patience = (struct patience){ .since = now, .rest = rest };
	}
	return wait_for(c, events, patience->since, most);
}

static int wait_to_receive(struct connection *c, int events, uint64_t since)
{
	return wait_for(c, events, since, c->timeout_ns);
}

/* ---- over a transport ---------------------------------------------------------------- */

static ssize_t transport_receive(struct connection *c, void *into, size_t room)
{
	uint64_t since = server_now_ns();
	int64_t got;

	while ((got = c->transport->receive(c->transport, into, room)) == -EAGAIN)
		if (wait_to_receive(c, c->transport->events, since) < 0)
			return -1;
	return got < 0 ? fail(c, (int)-got) : (ssize_t)got;
}

static int transport_send(struct connection *c, const uint8_t *from, size_t length)
{
	struct patience patience = { 0 };

	while (length) {
		int64_t sent = c->transport->send(c->transport, from, length);

		if (sent >= 0) {
			from += sent;
			length -= (size_t)sent;
			patience = (struct patience){ 0 };
		} else if (sent != -EAGAIN) {
			return fail(c, (int)-sent);
		} else if (wait_to_send(c, c->transport->events, &patience) < 0) {
			return -1;
		}
	}
	return 0;
}

int stream_flush(struct connection *c)
{
	struct patience patience = { 0 };
	int result;

	if (!c->transport)
		return 0;
	while ((result = c->transport->flush(c->transport)) == -EAGAIN)
		if (wait_to_send(c, c->transport->events, &patience) < 0)
			return -1;
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

ssize_t stream_receive(struct connection *c, void *into, size_t room)
{
	uint64_t since;
	ssize_t got;

	if (c->transport)
		return transport_receive(c, into, room);
	since = server_now_ns();
	while ((got = recv(c->fd, into, room, 0)) < 0) {
		if (errno == EAGAIN) {
			if (wait_to_receive(c, POLLIN, since) < 0)
				return -1;
		} else if (errno != EINTR) {
			return fail(c, errno);
		}
	}
	return got;
}

int stream_send(struct connection *c, const void *data, size_t length, bool more)
{
	struct patience patience = { 0 };
	const uint8_t *from = data;

	if (c->transport)
		return transport_send(c, from, length) < 0 || (!more && stream_flush(c) < 0) ? -1 : 0;
	while (length) {
		ssize_t sent = send(c->fd, from, length, MSG_NOSIGNAL | (more ? MSG_MORE : 0));

		if (sent >= 0) {
			from += sent;
			length -= (size_t)sent;
			patience = (struct patience){ 0 };
		} else if (errno == EAGAIN) {
			if (wait_to_send(c, POLLOUT, &patience) < 0)
				return -1;
		} else if (errno != EINTR) {
			return fail(c, errno);
		}
	}
	return 0;
}

int stream_send_file(struct connection *c, const struct served_image *served, uint64_t start, size_t length)
{
	struct patience patience = { 0 };
	off_t offset = (off_t)start;

	while ((c->transport || served->copied) && length) {
		size_t some = min_u64(length, SERVER_OUT);

		if (read_pages(c, served->fd, start, c->out, some) < 0 || check_unchanged(c, served) < 0 ||
		    stream_send(c, c->out, some, c->transport || some < length) < 0)
			return -1;
		start += some;
		length -= some;
	}
	if (c->transport)
		return 0;
	while (length) {
		ssize_t sent = sendfile(c->fd, served->fd, &offset, length);

		if (sent > 0) {
			length -= (size_t)sent;
			patience = (struct patience){ 0 };
		} else if (!sent) { /* the file has shrunk */
			return connection_fail(c, CRIUPY_SERVED_DATA, ENODATA);
		} else if (errno == EAGAIN) {
			if (wait_to_send(c, POLLOUT, &patience) < 0)
				return -1;
		} else if (errno == EIO) {
			return connection_fail(c, CRIUPY_SERVED_DATA, EIO);
		} else if (errno != EINTR) {
			return fail(c, errno);
		}
	}
	return check_unchanged(c, served);
}
