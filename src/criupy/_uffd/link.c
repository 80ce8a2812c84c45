/* The link to the source, over plain TCP or over a transport. */

#include <sys/socket.h>
#include <unistd.h>

#include "pager.h"

static ssize_t tcp_receive(struct link *link, const struct iovec *into, int nr)
{
	ssize_t got = readv(link->fd, into, nr);

	return got < 0 ? -errno : got;
}

static ssize_t tcp_send(struct link *link, const void *data, size_t length)
{
	ssize_t sent = send(link->fd, data, length, MSG_NOSIGNAL | MSG_DONTWAIT);

	return sent < 0 ? -errno : sent;
}

/* Record by record, until what was asked for is full or nothing more is there. */
static ssize_t transport_receive(struct link *link, const struct iovec *into, int nr)
{
	ssize_t total = 0;

	for (int i = 0; i < nr; i++) {
		uint8_t *to = into[i].iov_base;
		size_t room = into[i].iov_len;

		while (room) {
			int64_t got = link->transport->receive(link->transport, to, room);

			if (got <= 0) /* the end and a failure are there next time, too */
				return total ? total : (ssize_t)got;
			to += got;
			room -= (size_t)got;
			total += got;
		}
	}
	return total;
}

static ssize_t transport_send(struct link *link, const void *data, size_t length)
{
	return (ssize_t)link->transport->send(link->transport, data, length);
}

void link_init(struct link *link, int fd, struct criupy_transport *transport)
{
	*link = (struct link){
		.fd = fd,
		.transport = transport,
		.receive = transport ? transport_receive : tcp_receive,
		.send = transport ? transport_send : tcp_send,
	};
}

int link_push(struct link *link)
{
	return link->transport ? link->transport->flush(link->transport) : 0;
}

bool link_pending(const struct link *link)
{
	return link->transport && link->transport->pending(link->transport);
}

static void let_go(struct link *link)
{
	if (link->transport)
		link->transport->destroy(link->transport);
	link->transport = NULL;
	close(link->fd);
	link->fd = -1;
}

void link_leave(struct link *link)
{
	let_go(link);
}

void link_reset(struct link *link)
{
	/* connect(AF_UNSPEC) sends the RST also when somebody else holds a
	 * duplicate of the socket, where close alone would send nothing. */
	const struct sockaddr nowhere = { .sa_family = AF_UNSPEC };
	const struct linger now = { .l_onoff = 1, .l_linger = 0 };

	/* Either call may find the connection gone already, which is the aim. */
	(void)setsockopt(link->fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	(void)connect(link->fd, &nowhere, sizeof(nowhere));
	let_go(link);
}

void link_close(struct link *link)
{
	const struct linger off = { 0 };

	(void)setsockopt(link->fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off));
	let_go(link);
}
