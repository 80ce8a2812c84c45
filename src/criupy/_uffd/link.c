/* The link over plain TCP. */

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

void link_init_tcp(struct link *link, int fd)
{
	*link = (struct link){ .fd = fd, .receive = tcp_receive, .send = tcp_send };
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
	close(link->fd);
	link->fd = -1;
}

void link_close(struct link *link)
{
	const struct linger off = { 0 };

	(void)setsockopt(link->fd, SOL_SOCKET, SO_LINGER, &off, sizeof(off));
	close(link->fd);
	link->fd = -1;
}
