/* Replies in.
 *
 * The source answers every request once and in order, so those not answered yet
 * are a queue, and the next header must answer its head; anything else ends the
 * lane. The answer to a GET may be shorter than the request: the rest is asked
 * for again like any missing page. A GETV is answered whole.
 *
 * A reply goes from the socket into a staging buffer and from there to every
 * address space that wants it; the read that takes its last byte takes the next
 * header along. */

#include "pager.h"

#define READ_AT_ONCE (256u << 10)

/* An alert or a handshake, where a source that wants TLS begins. */
static bool looks_like_tls(const struct lane *l)
{
	const uint8_t *head = l->rx.header;

	return !l->link.transport && l->bytes_received == l->rx.header_have && l->rx.header_have >= 3 &&
	       (head[0] == 0x15 || head[0] == 0x16) && head[1] == 3;
}

static void bad_reply(struct criupy_pager *p, struct lane *l, const struct criupy_frame *reply, int fault)
{
	if (looks_like_tls(l))
		fault = CRIUPY_REPLY_TLS;
	p->stats.bad_reply = *reply;
	p->stats.bad_reply_offset = l->bytes_received - l->rx.header_have;
	p->stats.reply_fault = (uint32_t)fault;
	lane_lost(p, l, EPROTO);
}

/* Not even a whole header may come now, and CLOSE could not be sent behind a
 * part of one that never goes on. */
static void unasked(struct criupy_pager *p, struct lane *l)
{
	struct criupy_frame reply;

	memset(l->rx.header + l->rx.header_have, 0, sizeof(l->rx.header) - l->rx.header_have);
	(void)criupy_frame_decode(&reply, l->rx.header, l->frame_size);
	bad_reply(p, l, &reply, CRIUPY_REPLY_UNASKED);
}

/* Where an answer could begin an extended source may say that there is none. */
static bool may_be_refused(const struct lane *l)
{
	const uint32_t refused = CRIUPY_CMD_REFUSED;

	return l->extended && !memcmp(l->rx.header, &refused, min_u64(l->rx.header_have, sizeof(refused)));
}

static void begin_reply(struct criupy_pager *p, struct lane *l)
{
	struct criupy_frame reply, asked;
	const struct request *r;
	const struct run *run;
	int fault;

	(void)criupy_frame_decode(&reply, l->rx.header, l->frame_size);
	if (may_be_refused(l)) {
		l->refused = (uint32_t)reply.nr_pages;
		lane_lost(p, l, EACCES);
		return;
	}
	r = lane_request_first(l);
	run = lane_run(l, 0);
	asked = (struct criupy_frame){
		.cmd = r->nr_runs > 1 ? CRIUPY_CMD_GETV : CRIUPY_CMD_GET,
		.nr_pages = r->nr_pages,
		.vaddr = r->nr_runs > 1 ? r->nr_runs : image_address(image_extent_of(r->image, run->page), run->page),
		.dst_id = r->image->id,
	};
	fault = criupy_reply_check(&reply, &asked);
	if (fault) {
		bad_reply(p, l, &reply, fault);
		return;
	}
	window_reply_begins(&p->window, p->now_ns, r->sent_ns, r->alone, l == bulk_lane(p));
	l->rx.buffer = buffer_take(p);
	l->rx.payload_length = reply.nr_pages << PAGE_SHIFT;
	l->rx.payload_have = 0;
	l->rx.header_have = 0;
	l->rx.state = RX_PAYLOAD;
}

static void end_reply(struct criupy_pager *p, struct lane *l)
{
	const struct request r = *lane_request_first(l);
	struct buffer *b = l->rx.buffer;
	uint64_t nr = l->rx.payload_length >> PAGE_SHIFT;

	b->image = r.image;
	b->nr_runs = r.nr_runs;
	b->demand = r.demand;
	for (uint32_t i = 0; i < r.nr_runs; i++) {
		b->runs[i] = *lane_run(l, i);
		image_unmark(r.image, b->runs[i].page, b->runs[i].nr_pages, l->requested);
	}
	if (nr < r.nr_pages)
		b->runs[0].nr_pages = nr;
	lane_request_pop(p, l);
	p->stats.pages_received += nr;
	l->rx.buffer = NULL;
	l->rx.state = RX_HEADER;
	if (l == bulk_lane(p))
		window_reply_ends(&p->window, p->now_ns, l->rx.payload_length);
	if (install_reply(p, b))
		buffer_park(p, b);
	else
		buffer_free(p, b);
	if (nr < r.nr_pages)
		for (struct task *t = p->tasks; t; t = t->next)
			task_serve_waits(p, t);
}

static void end_close(struct criupy_pager *p, struct lane *l)
{
	int32_t status;

	if (may_be_refused(l)) {
		/* It said so before it read our CLOSE: the rest of that frame. */
		l->rx.state = RX_HEADER;
		return;
	}
	memcpy(&status, l->rx.header, sizeof(status));
	p->stats.close_status = status;
	if (!l->link.transport) {
		lane_close(p, l);
		pager_publish(p);
		return;
	}
	/* A source with TLS waits for our close_notify and sends its own. To close
	 * before that has come would be a reset, after which a stock one thinks
	 * that it failed, and lets its process go on. */
	l->rx.state = RX_FAREWELL;
	l->saying_goodbye = true;
	lane_flush(p, l);
}

void lane_abandon(struct criupy_pager *p, struct lane *l, int error)
{
	if (l->state == CRIUPY_LINK_OPEN && l->rx.state == RX_FAREWELL) {
		lane_close(p, l);
		pager_publish(p);
	} else {
		lane_lost(p, l, error);
	}
}

static void take_in(struct criupy_pager *p, struct lane *l, uint64_t got)
{
	uint64_t length;

	if (l->rx.state == RX_PAYLOAD) {
		length = min_u64(got, l->rx.payload_length - l->rx.payload_have);
		l->rx.payload_have += length;
		l->rx.header_have = got - length;
		if (l->rx.payload_have == l->rx.payload_length)
			end_reply(p, l);
	} else {
		l->rx.header_have += got;
	}
	/* Installing may have ended the link, by a failure. */
	if (l->state != CRIUPY_LINK_OPEN)
		return;
	if (l->rx.state == RX_HEADER && l->rx.header_have && !l->requests.nr && !may_be_refused(l))
		unasked(p, l);
	else if (l->rx.state == RX_HEADER && l->rx.header_have == l->frame_size)
		begin_reply(p, l);
	else if (l->rx.state == RX_STATUS && l->rx.header_have == sizeof(int32_t))
		end_close(p, l);
}

void lane_read(struct criupy_pager *p, struct lane *l)
{
	struct receiver *rx = &l->rx;
	struct iovec into[2];
	int nr = 1;
	ssize_t got;

	if (l->state != CRIUPY_LINK_OPEN)
		return;
	if (rx->state == RX_FAREWELL)
		rx->header_have = 0;
	if (rx->state == RX_PAYLOAD) {
		uint64_t rest = rx->payload_length - rx->payload_have;

		into[0].iov_base = rx->buffer->data + rx->payload_have;
		into[0].iov_len = min_u64(rest, READ_AT_ONCE);
		if (rest <= READ_AT_ONCE && l->requests.nr > 1) {
			into[1] = (struct iovec){ rx->header, l->frame_size };
			nr = 2;
		}
	} else {
		size_t length = rx->state == RX_STATUS ? sizeof(int32_t) : l->frame_size;

		into[0] = (struct iovec){ rx->header + rx->header_have, length - rx->header_have };
	}
	got = l->link.receive(&l->link, into, nr);
	if (got == -EAGAIN || got == -EINTR)
		return;
	if (got <= 0 && looks_like_tls(l)) {
		unasked(p, l);
		return;
	}
	if (got <= 0) {
		lane_abandon(p, l, got ? (int)-got : EPIPE);
		return;
	}
	l->heard_ns = p->now_ns;
	l->bytes_received += (uint64_t)got;
	p->stats.bytes_received += (uint64_t)got;
	take_in(p, l, (uint64_t)got);
}
