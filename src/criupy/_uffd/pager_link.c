/* Requests out, replies in.
 *
 * The source answers every GET once and in order, so the requests not answered
 * yet are a queue, and the next header must answer its head; anything else ends
 * the link. An answer may be shorter than the request: the rest is asked for
 * again like any missing page.
 *
 * A reply goes from the socket into a staging buffer and from there to every
 * address space that wants it; the read that takes its last byte takes the next
 * header along.
 *
 * How much is outstanding in the background decides two things against each
 * other: too little and the link idles for a round trip after each reply, too
 * much and a demand page queues behind all of it. Twice what the link carries in
 * a round trip keeps it busy; more would only add to the queue. */

#include <sys/epoll.h>
#include <unistd.h>

#include "pager.h"

#define READ_AT_ONCE (256u << 10)
#define MAX_WINDOW_PAGES (64u << 8)	/* 64 MiB */
#define BANDWIDTH_SAMPLE_NS 2000000

void link_open(struct criupy_pager *p, int fd, int frame_size, bool shared,
	       struct criupy_transport *transport)
{
	struct epoll_event watch = { .events = EPOLLIN, .data.ptr = &p->watch_link };

	link_init(&p->link, fd, transport);
	if (p->stats.outcome == CRIUPY_OUTCOME_VETOED || p->stats.outcome == CRIUPY_OUTCOME_RESTORE_FAILED) {
		/* The restore came to its end while the connection was made. */
		link_reset(&p->link);
		p->stats.link = CRIUPY_LINK_RESET;
		pager_publish(p);
		return;
	}
	p->frame_size = (size_t)frame_size;
	p->link_shared = shared;
	p->link_heard_ns = p->now_ns;
	p->stats.link = CRIUPY_LINK_OPEN;
	p->stats.window_pages = p->config.window_pages ? p->config.window_pages : 2 * p->config.request_pages;
	if (epoll_ctl(p->epoll, EPOLL_CTL_ADD, fd, &watch) < 0)
		link_lost(p, errno);
	pager_publish(p);
	for (struct task *t = p->tasks; t; t = t->next)
		task_serve_waits(p, t);
}

void link_lost(struct criupy_pager *p, int error)
{
	if (p->stats.link != CRIUPY_LINK_OPEN)
		return;
	p->stats.link = CRIUPY_LINK_LOST;
	p->stats.link_error = error;
	if (p->link.transport)
		p->link.transport->describe(p->link.transport, p->stats.link_fault, sizeof(p->stats.link_fault));
	/* The descriptor is kept: how it is closed depends on what becomes of
	 * the tasks (pager_end.c). */
	unwatch(p, p->link.fd);
	while (p->nr_requests) {
		struct request *r = &p->requests[p->first_request];

		criupy_image_set_requested(r->image, r->page, r->nr_pages, 0);
		p->first_request = (p->first_request + 1) & (p->room_requests - 1);
		p->nr_requests--;
	}
	p->stats.nr_outstanding = 0;
	if (p->rx.buffer) {
		buffer_free(p, p->rx.buffer);
		p->rx.buffer = NULL;
	}
	pager_publish(p);
}

void link_drop(struct criupy_pager *p)
{
	if (p->stats.link != CRIUPY_LINK_LOST || p->stats.phase >= CRIUPY_PHASE_CLOSING)
		return;
	link_reset(&p->link);
	p->stats.link = CRIUPY_LINK_NONE;
	p->stats.link_error = 0;
	p->stats.link_fault[0] = 0;
	p->out_have = 0;
	p->link_writable_wanted = false;
	p->saying_goodbye = false;
	p->rx.state = RX_HEADER;
	p->rx.header_have = 0;
	p->bytes_per_ns = 0;
	pager_publish(p);
}

/* ---- out ---------------------------------------------------------------------- */

static int room_for_request(struct criupy_pager *p)
{
	size_t room = p->room_requests ? p->room_requests * 2 : 64;
	struct request *requests;

	if (p->nr_requests < p->room_requests)
		return 0;
	requests = malloc(room * sizeof(*requests));
	if (!requests)
		return -ENOMEM;
	for (size_t i = 0; i < p->nr_requests; i++)
		requests[i] = p->requests[(p->first_request + i) & (p->room_requests - 1)];
	free(p->requests);
	p->requests = requests;
	p->first_request = 0;
	p->room_requests = room;
	return 0;
}

static int put_frame(struct criupy_pager *p, const struct criupy_frame *frame)
{
	if (p->out_have + p->frame_size > p->out_room) {
		size_t room = p->out_room ? p->out_room * 2 : 4096;
		uint8_t *out = realloc(p->out, room);

		if (!out)
			return -ENOMEM;
		p->out = out;
		p->out_room = room;
	}
	(void)criupy_frame_encode(frame, p->out + p->out_have, p->frame_size);
	p->out_have += p->frame_size;
	return 0;
}

int link_request(struct criupy_pager *p, struct criupy_image *image, uint64_t page,
		 uint64_t nr_pages, bool demand)
{
	const struct criupy_frame get = {
		.cmd = CRIUPY_CMD_GET,
		.nr_pages = nr_pages,
		.vaddr = image_address(image_extent_of(image, page), page),
		.dst_id = image->id,
	};
	int ret = room_for_request(p);

	if (!ret)
		ret = put_frame(p, &get);
	if (ret) {
		pager_fail(p, -ret);
		return ret;
	}
	if (!p->nr_requests)
		p->link_heard_ns = p->now_ns;
	p->requests[(p->first_request + p->nr_requests) & (p->room_requests - 1)] = (struct request){
		.image = image,
		.page = page,
		.nr_pages = nr_pages,
		.sent_ns = p->now_ns,
		.demand = demand,
		.alone = !p->nr_requests,
	};
	p->nr_requests++;
	criupy_image_set_requested(image, page, nr_pages, 1);
	p->stats.nr_outstanding += nr_pages;
	p->stats.nr_requests++;
	p->stats.nr_demand_requests += demand;
	return 0;
}

void link_flush(struct criupy_pager *p)
{
	struct epoll_event watch = { .events = EPOLLIN, .data.ptr = &p->watch_link };
	/* A stock source takes a frame out of one record. */
	size_t most = p->link.transport ? CRIUPY_TRANSPORT_RECORD / p->frame_size * p->frame_size : SIZE_MAX;
	bool blocked;
	ssize_t sent;
	int pushed;

	if (p->stats.link != CRIUPY_LINK_OPEN)
		return;
	if (!p->out_have && !p->link_writable_wanted && !p->saying_goodbye)
		return;
	while (p->out_have) {
		sent = p->link.send(&p->link, p->out, min_u64(p->out_have, most));
		if (sent == -EINTR)
			continue;
		if (sent == -EAGAIN)
			break;
		if (sent < 0) {
			link_lost(p, (int)-sent);
			return;
		}
		p->out_have -= (size_t)sent;
		memmove(p->out, p->out + sent, p->out_have);
	}
	pushed = p->saying_goodbye ? p->link.transport->close_notify(p->link.transport) : link_push(&p->link);
	if (pushed < 0 && pushed != -EAGAIN) {
		link_abandon(p, -pushed);
		return;
	}
	p->saying_goodbye = p->saying_goodbye && pushed;
	blocked = p->out_have || pushed;
	if (blocked == p->link_writable_wanted)
		return;
	p->link_writable_wanted = blocked;
	if (blocked)
		watch.events |= EPOLLOUT;
	if (epoll_ctl(p->epoll, EPOLL_CTL_MOD, p->link.fd, &watch) < 0)
		link_lost(p, errno);
}

void link_send_close(struct criupy_pager *p)
{
	/* A shared socket does not end by our closing it, so the source must be
	 * told not to wait for that. */
	const struct criupy_frame frame = {
		.cmd = p->link_shared ? CRIUPY_CMD_FORCE_CLOSE : CRIUPY_CMD_CLOSE,
	};

	p->close_sent = true;
	p->link_heard_ns = p->now_ns;
	p->rx.state = RX_STATUS;
	p->rx.header_have = 0;
	if (put_frame(p, &frame))
		link_lost(p, ENOMEM);
	link_flush(p);
}

/* ---- in ------------------------------------------------------------------------ */

static void measure(struct criupy_pager *p, uint64_t bytes)
{
	uint64_t window;

	p->busy_bytes += bytes;
	if (p->now_ns - p->busy_since_ns >= BANDWIDTH_SAMPLE_NS) {
		double sample = (double)p->busy_bytes / (double)(p->now_ns - p->busy_since_ns);

		p->bytes_per_ns = p->bytes_per_ns > 0 ? 0.75 * p->bytes_per_ns + 0.25 * sample : sample;
		p->busy_since_ns = p->now_ns;
		p->busy_bytes = 0;
	}
	if (p->config.window_pages || !p->stats.rtt_ns || p->bytes_per_ns <= 0)
		return;
	window = (uint64_t)(2 * p->bytes_per_ns * (double)p->stats.rtt_ns) >> PAGE_SHIFT;
	window = max_u64(window, 2 * p->config.request_pages);
	p->stats.window_pages = min_u64(window, MAX_WINDOW_PAGES);
}

/* An alert or a handshake, where a source that wants TLS begins. */
static bool looks_like_tls(const struct criupy_pager *p)
{
	const uint8_t *head = p->rx.header;

	return !p->link.transport && p->stats.bytes_received == p->rx.header_have && p->rx.header_have >= 3 &&
	       (head[0] == 0x15 || head[0] == 0x16) && head[1] == 3;
}

static void bad_reply(struct criupy_pager *p, const struct criupy_frame *reply, int fault)
{
	if (looks_like_tls(p))
		fault = CRIUPY_REPLY_TLS;
	p->stats.bad_reply = *reply;
	p->stats.bad_reply_offset = p->stats.bytes_received - p->rx.header_have;
	p->stats.reply_fault = (uint32_t)fault;
	link_lost(p, EPROTO);
}

/* Not even a whole header may come now, and CLOSE could not be sent behind a
 * part of one that never goes on. */
static void unasked(struct criupy_pager *p, size_t got)
{
	struct criupy_frame reply;

	p->rx.header_have += got;
	memset(p->rx.header + p->rx.header_have, 0, sizeof(p->rx.header) - p->rx.header_have);
	(void)criupy_frame_decode(&reply, p->rx.header, p->frame_size);
	bad_reply(p, &reply, CRIUPY_REPLY_UNASKED);
}

static void begin_reply(struct criupy_pager *p)
{
	struct request *r = &p->requests[p->first_request];
	struct criupy_frame reply, get;
	uint64_t rtt;
	int fault;

	(void)criupy_frame_decode(&reply, p->rx.header, p->frame_size);
	get = (struct criupy_frame){
		.nr_pages = r->nr_pages,
		.vaddr = image_address(image_extent_of(r->image, r->page), r->page),
		.dst_id = r->image->id,
	};
	fault = criupy_reply_check(&reply, &get);
	if (fault) {
		bad_reply(p, &reply, fault);
		return;
	}
	if (r->alone) {
		rtt = p->now_ns - r->sent_ns;
		p->stats.rtt_ns = p->stats.rtt_ns ? min_u64(p->stats.rtt_ns, rtt) : rtt;
		p->busy_since_ns = p->now_ns;
		p->busy_bytes = 0;
	}
	p->rx.buffer = buffer_take(p);
	p->rx.payload_length = reply.nr_pages << PAGE_SHIFT;
	p->rx.payload_have = 0;
	p->rx.header_have = 0;
	p->rx.state = RX_PAYLOAD;
}

static void end_reply(struct criupy_pager *p)
{
	struct request r = p->requests[p->first_request];
	struct buffer *b = p->rx.buffer;
	uint64_t nr = p->rx.payload_length >> PAGE_SHIFT;

	p->first_request = (p->first_request + 1) & (p->room_requests - 1);
	p->nr_requests--;
	p->stats.nr_outstanding -= r.nr_pages;
	p->stats.pages_received += nr;
	p->rx.buffer = NULL;
	p->rx.state = RX_HEADER;
	measure(p, p->rx.payload_length);
	b->image = r.image;
	b->page = r.page;
	b->nr_pages = nr;
	b->demand = r.demand;
	if (nr < r.nr_pages)
		criupy_image_set_requested(r.image, r.page + nr, r.nr_pages - nr, 0);
	if (install_run(p, r.image, r.page, nr, b->data, r.demand)) {
		buffer_park(p, b);
	} else {
		criupy_image_set_requested(r.image, r.page, nr, 0);
		buffer_free(p, b);
	}
	if (nr < r.nr_pages)
		for (struct task *t = p->tasks; t; t = t->next)
			task_serve_waits(p, t);
}

static void close_link(struct criupy_pager *p)
{
	p->stats.link = CRIUPY_LINK_CLOSED;
	unwatch(p, p->link.fd);
	link_close(&p->link);
	pager_publish(p);
}

static void end_close(struct criupy_pager *p)
{
	int32_t status;

	memcpy(&status, p->rx.header, sizeof(status));
	p->stats.close_status = status;
	if (!p->link.transport) {
		close_link(p);
		return;
	}
	/* A source with TLS waits for our close_notify and sends its own. To close
	 * before that has come would be a reset, after which a stock one thinks
	 * that it failed, and lets its process go on. */
	p->rx.state = RX_FAREWELL;
	p->saying_goodbye = true;
	link_flush(p);
}

void link_abandon(struct criupy_pager *p, int error)
{
	if (p->stats.link == CRIUPY_LINK_OPEN && p->rx.state == RX_FAREWELL)
		close_link(p);
	else
		link_lost(p, error);
}

static void take_in(struct criupy_pager *p, uint64_t got)
{
	uint64_t length;

	if (p->rx.state == RX_PAYLOAD) {
		length = min_u64(got, p->rx.payload_length - p->rx.payload_have);
		p->rx.payload_have += length;
		p->rx.header_have = got - length;
		if (p->rx.payload_have == p->rx.payload_length)
			end_reply(p);
	} else {
		p->rx.header_have += got;
	}
	/* Installing may have ended the link, by a failure. */
	if (p->stats.link != CRIUPY_LINK_OPEN)
		return;
	if (p->rx.state == RX_HEADER && p->rx.header_have == p->frame_size)
		begin_reply(p);
	else if (p->rx.state == RX_STATUS && p->rx.header_have == sizeof(int32_t))
		end_close(p);
}

void link_read(struct criupy_pager *p)
{
	struct receiver *rx = &p->rx;
	struct iovec into[2];
	int nr = 1;
	ssize_t got;

	if (p->stats.link != CRIUPY_LINK_OPEN)
		return;
	if (rx->state == RX_FAREWELL)
		rx->header_have = 0;
	if (rx->state == RX_PAYLOAD) {
		uint64_t rest = rx->payload_length - rx->payload_have;

		into[0].iov_base = rx->buffer->data + rx->payload_have;
		into[0].iov_len = min_u64(rest, READ_AT_ONCE);
		if (rest <= READ_AT_ONCE && p->nr_requests > 1) {
			into[1] = (struct iovec){ rx->header, p->frame_size };
			nr = 2;
		}
	} else {
		size_t length = rx->state == RX_STATUS ? sizeof(int32_t) : p->frame_size;

		into[0] = (struct iovec){ rx->header + rx->header_have, length - rx->header_have };
	}
	got = p->link.receive(&p->link, into, nr);
	if (got == -EAGAIN || got == -EINTR)
		return;
	if (got <= 0 && looks_like_tls(p)) {
		unasked(p, 0);
		return;
	}
	if (got <= 0) {
		link_abandon(p, got ? (int)-got : EPIPE);
		return;
	}
	p->link_heard_ns = p->now_ns;
	p->stats.bytes_received += (uint64_t)got;
	if (rx->state == RX_HEADER && !p->nr_requests)
		unasked(p, (size_t)got);
	else
		take_in(p, (uint64_t)got);
}
