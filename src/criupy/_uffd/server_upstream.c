/* What the page server gives out of an upstream: pages are held while they are sent,
 * and waited for before. */

#include "server.h"

int criupy_server_add_upstream(struct criupy_server *server, struct criupy_upstream *upstream)
{
	bool evicts = upstream->config.cache_pages;

	if (server->nr_connections || server->upstream)
		return -EBUSY;
	if (server->config.receives)
		return -EINVAL;
	for (size_t i = 0; i < upstream->nr_images; i++)
		if (server_find(server, upstream->images[i].image->id))
			return -EEXIST;
	for (size_t i = 0; i < upstream->nr_images; i++) {
		const struct upstream_image *from = &upstream->images[i];
		const struct served_image served = {
			.image = from->image, .fd = from->fd, .upstream = upstream, .first = from->first,
			.copied = evicts,
		};
		int result = server_insert(server, &served);

		if (result < 0) {
			server_forget(server, upstream);
			return result;
		}
	}
	upstream_share(upstream);
	server->upstream = upstream;
	return 0;
}

static int fail(struct connection *c, int error)
{
	switch (error) {
	case ECANCELED:
		return connection_fail(c, CRIUPY_SERVED_CUT, 0);
	case EPIPE:
		return connection_fail(c, CRIUPY_SERVED_GONE, 0);
	case ESHUTDOWN:
		return connection_fail(c, CRIUPY_SERVED_GONE, error);
	default:
		return connection_fail(c, CRIUPY_SERVED_DISK, error);
	}
}

int check_pages(struct connection *c, const struct served_image *served, uint64_t page, uint64_t nr)
{
	int result = served->upstream ? upstream_check(served->upstream, served->first + page, nr) : 0;

	return result < 0 ? fail(c, -result) : 0;
}

int hold_pages(struct connection *c, const struct served_image *served, uint64_t page, uint64_t *nr)
{
	uint64_t most = *nr;
	int result;

	if (!served->upstream)
		return 0;
	result = upstream_hold(served->upstream, served->first + page, most, NULL, &c->pin, nr);
	if (result == -EAGAIN) {
		/* What was answered before need not wait. */
		if (connection_flush(c, false) < 0)
			return -1;
		connection_publish(c);
		result = upstream_hold(served->upstream, served->first + page, most, &c->cut, &c->pin, nr);
	}
	return result < 0 ? fail(c, -result) : 0;
}

int release_pages(struct connection *c, const struct served_image *served, int result)
{
	if (served->upstream)
		upstream_release(served->upstream, &c->pin, result == 0);
	return result;
}
