/* Replies in.
 *
 * The source answers every request once and in order, so those not answered yet
 * are a queue, and the next header must answer its head; anything else ends the
 * lane. The answer to a GET may be shorter than the request: the rest is asked
 * for again like any missing page. A GETV is answered whole.
 *
 * A reply goes from the socket into a staging buffer and from there to every
 * address space that wants it, piece by piece while it arrives: a piece is a full
 * buffer, or what the socket had, if any thread waits for a page in that or for one
 * that comes on another lane. The read that takes the reply's last byte takes the next
 * header along. */

#include "pager.h"

#define SHORT_READ (64u << 10)

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
	window_reply_begins(&p->window, p->now_ns, r->sent_ns, l == bulk_lane(p));
	l->rx.buffer = buffer_take(p);
	l->rx.buffer_have = 0;
	l->rx.payload_left = reply.nr_pages << PAGE_SHIFT;
	l->rx.header_have = 0;
	l->rx.state = RX_PAYLOAD;
}

/* Install the whole pages that are there. */
static void end_piece(struct criupy_pager *p, struct lane *l)
{
	struct receiver *rx = &l->rx;
	struct buffer *b = rx->buffer;
	uint64_t nr = rx->buffer_have >> PAGE_SHIFT, rest = rx->buffer_have % CRIUPY_PAGE_SIZE;
	uint8_t part[CRIUPY_PAGE_SIZE];

	if (!nr)
		return;
	memcpy(part, b->data + (nr << PAGE_SHIFT), rest);
	rx->buffer = NULL;
	rx->buffer_have = rest;
	lane_request_came(p, l, nr, b);
	p->stats.pages_received += nr;
	if (l == bulk_lane(p))
		window_received(&p->window, nr << PAGE_SHIFT);
	install_piece(p, b);
	if (!(rest + rx->payload_left))
		return;
	rx->buffer = buffer_take(p);
	memcpy(rx->buffer->data, part, rest);
}

/* Whether what has come and is not installed is waited for. */
static bool has_waited_for(const struct lane *l)
{
	const struct request *r = lane_request_first(l);
	uint64_t first = r->nr_came, end = first + (l->rx.buffer_have >> PAGE_SHIFT), at = 0;

	for (uint32_t i = 0; i < r->nr_runs && at < end; at += lane_run(l, i++)->nr_pages) {
		const struct run *run = lane_run(l, i);
		uint64_t from = first > at ? first - at : 0, to = min_u64(end - at, run->nr_pages);

		if (from < to && is_waited_for(r->image, run->page + from, to - from))
			return true;
	}
	return false;
}

void lane_install(struct criupy_pager *p, struct lane *l)
{
	if (l->state == CRIUPY_LINK_OPEN && l->rx.state == RX_PAYLOAD)
		end_piece(p, l);
}

void lane_install_waited_for(struct criupy_pager *p, struct lane *l)
{
	if (l->state == CRIUPY_LINK_OPEN && l->rx.state == RX_PAYLOAD && has_waited_for(l))
		end_piece(p, l);
}

static void end_reply(struct criupy_pager *p, struct lane *l)
{
	const struct request *r = lane_request_first(l);
	bool is_short = r->nr_came < r->nr_pages;

	lane_request_pop(p, l);
	l->rx.state = RX_HEADER;
	if (is_short)
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

/* What somebody waits for may come on the other lane meanwhile, so little is done at a time. */
static bool other_is_waited_for(struct criupy_pager *p, const struct lane *l)
{
	return p->nr_waits && l == bulk_lane(p) && urgent_lane(p)->state == CRIUPY_LINK_OPEN;
}

/* The last bytes of a reply may bring some of the next header with them. More
 * is for whether there may be more at once. */
static void take_in_payload(struct criupy_pager *p, struct lane *l, uint64_t got, bool more)
{
	struct receiver *rx = &l->rx;
	uint64_t length = min_u64(got, rx->payload_left);

	rx->buffer_have += length;
	rx->payload_left -= length;
	rx->header_have = got - length;
	if (!rx->payload_left || rx->buffer_have == PIECE_PAGES << PAGE_SHIFT ||
	    (!more && p->nr_waits && (other_is_waited_for(p, l) || has_waited_for(l))))
		end_piece(p, l);
	if (l->state == CRIUPY_LINK_OPEN && !rx->payload_left)
		end_reply(p, l);
}

static void take_in_header(struct criupy_pager *p, struct lane *l)
{
	const struct receiver *rx = &l->rx;

	if (rx->state == RX_HEADER && rx->header_have && !l->requests.nr && !may_be_refused(l))
		unasked(p, l);
	else if (rx->state == RX_HEADER && rx->header_have == l->frame_size)
		begin_reply(p, l);
	else if (rx->state == RX_STATUS && rx->header_have == sizeof(int32_t))
		end_close(p, l);
}

void lane_read(struct criupy_pager *p, struct lane *l)
{
	struct receiver *rx = &l->rx;
	struct iovec into[2];
	uint64_t asked;
	int nr = 1;
	ssize_t got;

	if (l->state != CRIUPY_LINK_OPEN)
		return;
	if (rx->state == RX_FAREWELL)
		rx->header_have = 0;
	if (rx->state == RX_PAYLOAD) {
		uint64_t room = (PIECE_PAGES << PAGE_SHIFT) - rx->buffer_have;

		if (other_is_waited_for(p, l))
			room = min_u64(room, SHORT_READ);

		into[0].iov_base = rx->buffer->data + rx->buffer_have;
		into[0].iov_len = min_u64(rx->payload_left, room);
		if (rx->payload_left <= room && l->requests.nr > 1) {
			into[1] = (struct iovec){ rx->header, l->frame_size };
			nr = 2;
		}
	} else {
		size_t length = rx->state == RX_STATUS ? sizeof(int32_t) : l->frame_size;

		into[0] = (struct iovec){ rx->header + rx->header_have, length - rx->header_have };
	}
	asked = into[0].iov_len;
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
	if (rx->state == RX_PAYLOAD)
		take_in_payload(p, l, (uint64_t)got, (uint64_t)got >= asked);
	else
		rx->header_have += (uint64_t)got;
	if (l->state == CRIUPY_LINK_OPEN && rx->state != RX_PAYLOAD)
		take_in_header(p, l);
}
