/* Receiving what a dumper uploads: one image after the other, each a pagemap's
 * entries and the pages that some of them have.
 *
 * Pages go from the socket into a buffer and from there into the image's pages
 * file, in the order they come, many small ones with one write. Entries are kept
 * until the image ends. What happens once per image is not done here: OPEN,
 * PARENT and CLOSE become questions, and the thread sleeps until they are
 * answered. The dumper waits for these answers, too, so nothing is lost by it.
 *
 * Nothing is believed: the entries of an image must ascend without overlap and
 * have flags that mean something, so that what is written can be read. */

#include <fcntl.h>
#include <unistd.h>

#include "server.h"

void upload_free(struct criupy_server *server, struct upload *upload)
{
	if (!upload)
		return;
	atomic_fetch_sub(&server->nr_entries, upload->room);
	if (upload->fd >= 0)
		close(upload->fd);
	free(upload->starts);
	free(upload->nr_pages);
	free(upload->flags);
	free(upload);
}

int criupy_punch_hole(int fd, uint64_t offset, uint64_t length)
{
	int result;

	if (offset > INT64_MAX || length > INT64_MAX - offset)
		return -EINVAL;
	do
		result = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length);
	while (result < 0 && errno == EINTR);
	return result < 0 ? -errno : 0;
}

/* ---- the pages file ------------------------------------------------------------------ */

static int write_held(struct connection *c, struct upload *u)
{
	const uint8_t *from = u->hold;

	while (u->held) {
		ssize_t done = pwrite(u->fd, from, u->held, (off_t)u->written);

		if (done > 0) {
			from += done;
			u->held -= (size_t)done;
			u->written += (uint64_t)done;
		} else if (!done || errno != EINTR) {
			return connection_fail(c, CRIUPY_SERVED_DISK, done ? errno : ENOSPC);
		}
	}
	/* The dumper's processes stand still while it waits for what is written to
	 * be on disk: begin with it now. Where this is not known, nothing is lost. */
	if (u->written - u->written_back >= SERVER_WRITEBACK) {
		(void)sync_file_range(u->fd, (off_t)u->written_back, (off_t)(u->written - u->written_back),
				      SYNC_FILE_RANGE_WRITE);
		u->written_back = u->written;
	}
	connection_publish(c);
	return 0;
}

/* All that was received is in the file; whoever gave it has its own descriptor. */
static int end_file(struct connection *c, struct upload *u)
{
	int fd = u->fd;

	if (write_held(c, u) < 0)
		return -1;
	u->fd = -1;
	u->id = 0;
	/* Some file systems notice only now that there is no room. */
	return fd >= 0 && close(fd) < 0 && errno != EINTR ? connection_fail(c, CRIUPY_SERVED_DISK, errno) : 0;
}

static int receive_pages(struct connection *c, struct upload *u, uint64_t nr_pages)
{
	uint64_t left = nr_pages << PAGE_SHIFT;

	while (left) {
		size_t had = c->in_end - c->in_start;
		size_t room = (size_t)min_u64(left, SERVER_HELD - u->held);
		ssize_t got;

		if (had) {
			got = (ssize_t)min_u64(room, had);
			memcpy(u->hold + u->held, c->in + c->in_start, (size_t)got);
			c->in_start += (size_t)got;
		} else {
			c->timeout_ns = c->server->config.stall_timeout_ns;
			got = stream_receive(c, u->hold + u->held, room);
			if (got < 0)
				return -1;
			if (!got)
				return connection_fail(c, CRIUPY_SERVED_TRUNCATED, 0);
			c->counted.bytes_received += (uint64_t)got;
		}
		u->held += (size_t)got;
		c->offset += (uint64_t)got;
		left -= (uint64_t)got;
		if (u->held == SERVER_HELD && write_held(c, u) < 0)
			return -1;
	}
	c->counted.nr_pages += nr_pages;
	if (!c->counted.first_ns)
		c->counted.first_ns = server_now_ns();
	return 0;
}

/* ---- entries ------------------------------------------------------------------------- */

static int grow(struct connection *c, struct upload *u)
{
	uint64_t used = atomic_load(&c->server->nr_entries), more, room, *starts, *nr_pages;
	uint8_t *flags;

	do {
		more = min_u64(u->room ? u->room : 1024, SERVER_ENTRIES - used);
		if (!more)
			return connection_fail(c, CRIUPY_SERVED_ERROR, ENOMEM);
	} while (!atomic_compare_exchange_weak(&c->server->nr_entries, &used, used + more));
	room = u->room + more;
	starts = realloc(u->starts, room * sizeof(*starts));
	if (!starts)
		goto no_memory;
	u->starts = starts;
	nr_pages = realloc(u->nr_pages, room * sizeof(*nr_pages));
	if (!nr_pages)
		goto no_memory;
	u->nr_pages = nr_pages;
	flags = realloc(u->flags, room * sizeof(*flags));
	if (!flags)
		goto no_memory;
	u->flags = flags;
	u->room = room;
	return 0;

no_memory:
	atomic_fetch_sub(&c->server->nr_entries, more);
	return connection_fail(c, CRIUPY_SERVED_ERROR, ENOMEM);
}

static uint32_t entry_flags(const struct criupy_frame *frame)
{
	switch (frame->cmd & CRIUPY_CMD_MASK) {
	case CRIUPY_CMD_ADD:
		return CRIUPY_PE_PRESENT;	/* these two are older than flags */
	case CRIUPY_CMD_HOLE:
		return CRIUPY_PE_PARENT;
	default:
		return frame->cmd >> 16;
	}
}

static bool flags_are_sane(uint32_t flags)
{
	switch (flags) {
	case CRIUPY_PE_PARENT:
	case CRIUPY_PE_LAZY:
	case CRIUPY_PE_PRESENT:
	case CRIUPY_PE_LAZY | CRIUPY_PE_PRESENT:
		return true;
	default:
		return false;
	}
}

int receive_add(struct connection *c, const struct criupy_frame *frame)
{
	struct upload *u = c->upload;
	uint32_t flags = entry_flags(frame);

	if (!u || !u->id || frame->dst_id != u->id)
		return connection_fail(c, CRIUPY_SERVED_UNOPENED, 0);
	if (!flags_are_sane(flags))
		return connection_fail(c, CRIUPY_SERVED_FLAGS, 0);
	if (frame->vaddr % CRIUPY_PAGE_SIZE)
		return connection_fail(c, CRIUPY_SERVED_ADDRESS, 0);
	if (!frame->nr_pages || frame->nr_pages > (UINT64_MAX - frame->vaddr) >> PAGE_SHIFT ||
	    frame->nr_pages > SERVER_IMAGE_PAGES - u->pages)
		return connection_fail(c, CRIUPY_SERVED_COUNT, 0);
	if (frame->vaddr < u->end)
		return connection_fail(c, CRIUPY_SERVED_ORDER, 0);
	if (u->nr == u->room && grow(c, u) < 0)
		return -1;
	u->starts[u->nr] = frame->vaddr;
	u->nr_pages[u->nr] = frame->nr_pages;
	u->flags[u->nr] = (uint8_t)flags;
	u->nr++;
	u->pages += frame->nr_pages;
	u->end = frame->vaddr + (frame->nr_pages << PAGE_SHIFT);
	return flags & CRIUPY_PE_PRESENT ? receive_pages(c, u, frame->nr_pages) : 0;
}

/* ---- questions ------------------------------------------------------------------------- */

static int send_now(struct connection *c, const void *data, size_t length)
{
	memcpy(c->out, data, length);
	c->out_length = length;
	return connection_flush(c, false);
}

int receive_open(struct connection *c, const struct criupy_frame *frame)
{
	struct upload *u = c->upload;
	uint8_t has_parent;

	if (!frame_names_image(frame->dst_id))
		return connection_fail(c, CRIUPY_SERVED_ID, 0);
	if (!u) {
		u = c->upload = calloc(1, sizeof(*u));
		if (!u)
			return connection_fail(c, CRIUPY_SERVED_ERROR, ENOMEM);
		u->fd = -1;
	}
	if (end_file(c, u) < 0 || connection_ask(c, frame, NULL, true) < 0)
		return -1;
	u->nr = u->end = u->pages = u->written = u->written_back = 0;
	u->fd = c->answer_fd;
	if (c->answer < 0)
		return connection_fail(c, CRIUPY_SERVED_REFUSED, -c->answer);
	u->id = frame->dst_id;
	has_parent = c->answer > 0;
	return (frame->cmd & CRIUPY_CMD_MASK) == CRIUPY_CMD_OPEN2 ? send_now(c, &has_parent, 1) : 0;
}

int receive_parent(struct connection *c, const struct criupy_frame *frame)
{
	int32_t has_parent;

	if (!frame_names_image(frame->dst_id))
		return connection_fail(c, CRIUPY_SERVED_ID, 0);
	if (connection_ask(c, frame, NULL, false) < 0)
		return -1;
	if (c->answer < 0)
		return connection_fail(c, CRIUPY_SERVED_REFUSED, -c->answer);
	has_parent = c->answer > 0;
	return send_now(c, &has_parent, sizeof(has_parent));
}

int receive_close(struct connection *c, const struct criupy_frame *frame, int32_t *status)
{
	if (c->upload && end_file(c, c->upload) < 0)
		return -1;
	if (connection_ask(c, frame, NULL, true) < 0)
		return -1;
	*status = c->answer;
	return 0;
}
