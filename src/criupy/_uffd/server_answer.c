/* Answering a GET from the images.
 *
 * A short answer is read into the buffer behind the answers before it, and all
 * go with one send: at one page each, system calls are what costs. A long one
 * goes from the page cache to the socket. Nothing is mapped, so nothing of an
 * image is ever resident here. Whether somebody writes to it is looked at before
 * the answers to what was received together, and after every read, before what was
 * read is sent; what went from the page cache only afterwards, before more goes.
 * Other bytes than were dumped are worse than none.
 *
 * Over a transport every header has a record of its own and pages begin one, as
 * a stock server sends them: a stock client that took a header out of a record
 * waits for the socket, not for the rest of the record. */

#include <unistd.h>

#include "server.h"

int read_pages(struct connection *c, int fd, uint64_t offset, uint8_t *into, size_t length)
{
	while (length) {
		ssize_t got = pread(fd, into, length, (off_t)offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return connection_fail(c, CRIUPY_SERVED_DATA, got ? errno : ENODATA);
		into += got;
		offset += (uint64_t)got;
		length -= (size_t)got;
	}
	return 0;
}

int check_unchanged(struct connection *c, const struct served_image *served)
{
	int result = server_check_pages(served);

	if (result == -ESTALE)
		return connection_fail(c, CRIUPY_SERVED_CHANGED, 0);
	return result < 0 ? connection_fail(c, CRIUPY_SERVED_DATA, -result) : 0;
}

/* Lazy pages that lie together: in the image, in its file. */
struct pages {
	uint64_t page;
	uint64_t number;
	uint64_t nr;
};

/* Those that begin at an address, at most nr; none when the first is none. */
static struct pages find_pages(const struct served_image *served, uint64_t address, uint64_t nr)
{
	size_t i = image_extent_after(served->image, LOCAL, address);
	const struct extent *e = &served->image->extents[i];
	uint64_t offset;

	if (i == served->image->nr_extents || address < e->start)
		return (struct pages){ 0 };
	offset = (address - e->start) >> PAGE_SHIFT;
	return (struct pages){
		.page = e->first + offset, .number = e->data + offset, .nr = min_u64(nr, e->nr_pages - offset),
	};
}

static int check_run(struct connection *c, uint64_t address, uint64_t nr_pages)
{
	if (address % CRIUPY_PAGE_SIZE)
		return connection_fail(c, CRIUPY_SERVED_ADDRESS, 0);
	if (!nr_pages || (nr_pages - 1) > (UINT64_MAX - address) >> PAGE_SHIFT)
		return connection_fail(c, CRIUPY_SERVED_COUNT, 0);
	return 0;
}

static const struct served_image *find_image(struct connection *c, uint64_t id)
{
	const struct served_image *served = server_find(c->server, id);

	if (!served) {
		connection_fail(c, CRIUPY_SERVED_ID, 0);
		return NULL;
	}
	if (served != c->unchanged) {
		if (check_unchanged(c, served) < 0)
			return NULL;
		c->unchanged = served;
	}
	return served;
}

/* More answers fit into the buffer, which has those of one image only. */
static int make_room(struct connection *c, const struct served_image *served, size_t length)
{
	if (c->out_length + length > SERVER_OUT || (c->in_out && c->in_out != served))
		return connection_flush(c, true);
	return 0;
}

/* What goes before pages; without a transport it waits in the buffer for them. */
static int put_header(struct connection *c, const struct served_image *served, const struct criupy_frame *reply)
{
	uint8_t header[CRIUPY_FRAME_32];

	if (c->transport) {
		criupy_frame_encode(reply, header, c->frame_size);
		return stream_send(c, header, c->frame_size, true);
	}
	if (make_room(c, served, c->frame_size) < 0)
		return -1;
	criupy_frame_encode(reply, c->out + c->out_length, c->frame_size);
	c->out_length += c->frame_size;
	return 0;
}

static int put_pages(struct connection *c, const struct served_image *served, struct pages pages)
{
	uint64_t offset = pages.number << PAGE_SHIFT;
	size_t length = (size_t)pages.nr << PAGE_SHIFT;

	if (c->transport || pages.nr >= SERVER_SENDFILE_PAGES) {
		if (connection_flush(c, true) < 0 || stream_send_file(c, served, offset, length) < 0)
			return -1;
		connection_sent(c, pages.nr);
		return 0;
	}
	if (make_room(c, served, length) < 0 ||
	    read_pages(c, served->fd, offset, c->out + c->out_length, length) < 0)
		return -1;
	c->out_length += length;
	c->out_pages += pages.nr;
	c->in_out = served;
	return 0;
}

static int put_answer(struct connection *c, const struct served_image *served, const struct criupy_frame *reply,
		      struct pages pages)
{
	return put_header(c, served, reply) < 0 ? -1 : put_pages(c, served, pages);
}

int answer_get(struct connection *c, const struct criupy_frame *frame)
{
	struct criupy_frame reply = *frame;
	const struct served_image *served;
	struct pages pages;

	if (check_run(c, frame->vaddr, frame->nr_pages) < 0)
		return -1;
	served = find_image(c, frame->dst_id);
	if (!served)
		return -1;
	reply.cmd = CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16;
	pages = find_pages(served, frame->vaddr, min_u64(frame->nr_pages, SERVER_ANSWER_PAGES));
	if (!pages.nr)
		return connection_fail(c, CRIUPY_SERVED_PAGE, 0);
	if (hold_pages(c, served, pages.page, &pages.nr) < 0)
		return session_gone(c);
	reply.nr_pages = pages.nr;
	return release_pages(c, served, put_answer(c, served, &reply, pages));
}

/* All of them, however few can be held at a time. */
static int put_run(struct connection *c, const struct served_image *served, struct pages run)
{
	while (run.nr) {
		struct pages pages = run;

		if (hold_pages(c, served, pages.page, &pages.nr) < 0 ||
		    release_pages(c, served, put_pages(c, served, pages)) < 0)
			return -1;
		run.page += pages.nr;
		run.number += pages.nr;
		run.nr -= pages.nr;
	}
	return 0;
}

/* All or nothing: what is wrong with any run is found before the header goes. */
int answer_getv(struct connection *c, const struct criupy_frame *frame, const uint8_t *runs)
{
	const uint8_t *end = runs + frame->vaddr * CRIUPY_RUN_LENGTH;
	const struct served_image *served = find_image(c, frame->dst_id);
	struct criupy_frame reply = *frame;
	uint64_t total = 0;
	struct pages pages;

	if (!served)
		return -1;
	for (const uint8_t *run = runs; run < end; run += CRIUPY_RUN_LENGTH) {
		uint64_t address, nr_pages;

		run_decode(run, &address, &nr_pages);
		if (check_run(c, address, nr_pages) < 0)
			return -1;
		if (nr_pages > CRIUPY_MAX_RUN_PAGES)
			return connection_fail(c, CRIUPY_SERVED_COUNT, 0);
		pages = find_pages(served, address, nr_pages);
		if (pages.nr != nr_pages)
			return connection_fail(c, CRIUPY_SERVED_PAGE, 0);
		if (check_pages(c, served, pages.page, pages.nr) < 0)
			return session_gone(c);
		total += nr_pages;
	}
	if (total != frame->nr_pages || total > CRIUPY_MAX_RUN_PAGES)
		return connection_fail(c, CRIUPY_SERVED_COUNT, 0);
	reply.cmd = CRIUPY_CMD_GETV | CRIUPY_PE_PRESENT << 16;
	if (put_header(c, served, &reply) < 0)
		return -1;
	for (const uint8_t *run = runs; run < end; run += CRIUPY_RUN_LENGTH) {
		uint64_t address, nr_pages;

		run_decode(run, &address, &nr_pages);
		if (put_run(c, served, find_pages(served, address, nr_pages)) < 0)
			return -1;
	}
	return 0;
}
