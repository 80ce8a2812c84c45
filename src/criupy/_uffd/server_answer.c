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

int answer_get(struct connection *c, const struct criupy_frame *frame)
{
	struct criupy_frame reply = *frame;
	const struct served_image *served;
	const struct extent *e;
	uint64_t page, offset;
	size_t i, length;

	if (frame->vaddr % CRIUPY_PAGE_SIZE)
		return connection_fail(c, CRIUPY_SERVED_ADDRESS, 0);
	if (!frame->nr_pages || (frame->nr_pages - 1) > (UINT64_MAX - frame->vaddr) >> PAGE_SHIFT)
		return connection_fail(c, CRIUPY_SERVED_COUNT, 0);
	served = server_find(c->server, frame->dst_id);
	if (!served)
		return connection_fail(c, CRIUPY_SERVED_ID, 0);
	if (served != c->unchanged) {
		if (check_unchanged(c, served) < 0)
			return -1;
		c->unchanged = served;
	}
	i = image_extent_after(served->image, frame->vaddr);
	e = &served->image->extents[i];
	if (i == served->image->nr_extents || frame->vaddr < e->start)
		return connection_fail(c, CRIUPY_SERVED_PAGE, 0);
	page = (frame->vaddr - e->start) >> PAGE_SHIFT;
	reply.cmd = CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16;
	reply.nr_pages = min_u64(min_u64(frame->nr_pages, e->nr_pages - page), SERVER_ANSWER_PAGES);
	offset = (e->data + page) << PAGE_SHIFT;
	length = (size_t)reply.nr_pages << PAGE_SHIFT;

	if (c->transport) {
		uint8_t header[CRIUPY_FRAME_32];

		criupy_frame_encode(&reply, header, c->frame_size);
		if (stream_send(c, header, c->frame_size, true) < 0 ||
		    stream_send_file(c, served, offset, length) < 0)
			return -1;
		connection_sent(c, reply.nr_pages);
	} else if (reply.nr_pages < SERVER_SENDFILE_PAGES) {
		if ((c->out_length + c->frame_size + length > SERVER_OUT || (c->in_out && c->in_out != served)) &&
		    connection_flush(c, true) < 0)
			return -1;
		criupy_frame_encode(&reply, c->out + c->out_length, c->frame_size);
		c->out_length += c->frame_size;
		if (read_pages(c, served->fd, offset, c->out + c->out_length, length) < 0)
			return -1;
		c->out_length += length;
		c->out_pages += reply.nr_pages;
		c->in_out = served;
	} else {
		if (c->out_length + c->frame_size > SERVER_OUT && connection_flush(c, true) < 0)
			return -1;
		criupy_frame_encode(&reply, c->out + c->out_length, c->frame_size);
		c->out_length += c->frame_size;
		if (connection_flush(c, true) < 0 || stream_send_file(c, served, offset, length) < 0)
			return -1;
		connection_sent(c, reply.nr_pages);
	}
	return 0;
}
