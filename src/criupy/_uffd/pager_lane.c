/* The life of a lane, and what goes out on it.
 *
 * A stock source has one connection, the lane for bulk. A page server of ours
 * may have a second one, on which nothing but what a thread waits for ever
 * queues. Either may be lost: what it was asked for is missing again, and the
 * other goes on, demand over whichever there is. Only the lane for bulk ends
 * with a word to the source. */

#include <sys/epoll.h>

#include "pager.h"

void lanes_init(struct criupy_pager *p)
{
	for (int i = 0; i < NR_LANES; i++) {
		p->lanes[i].watched = WATCH_LANE;
		p->lanes[i].link.fd = -1;
	}
	bulk_lane(p)->requested = REQUESTED_BULK;
	urgent_lane(p)->requested = REQUESTED_URGENT;
}

void lanes_free(struct criupy_pager *p)
{
	for (int i = 0; i < NR_LANES; i++) {
		struct lane *l = &p->lanes[i];

		if (l->link.fd >= 0)
			link_close(&l->link);
		free(l->out);
		free(l->requests.items);
		free(l->runs.items);
	}
}

/* Whether a connection comes when there is no more use for it; it ends here. */
static bool too_late(struct criupy_pager *p, struct lane *l)
{
	if (p->stats.outcome == CRIUPY_OUTCOME_VETOED || p->stats.outcome == CRIUPY_OUTCOME_RESTORE_FAILED) {
		/* The restore came to its end while the connection was made. */
		link_reset(&l->link);
		l->state = CRIUPY_LINK_RESET;
		return true;
	}
	if (l->extended && (p->stats.phase == CRIUPY_PHASE_ENDED ||
			    (p->stats.phase == CRIUPY_PHASE_CLOSING && l == urgent_lane(p)))) {
		link_close(&l->link);
		return true;
	}
	return false;
}

void lane_open(struct criupy_pager *p, const struct command *command)
{
	struct lane *l = &p->lanes[command->lane];
	struct epoll_event watch = { .events = EPOLLIN, .data.ptr = l };

	/* One that was lost, and should be dropped when the end had begun. */
	lane_close(p, l);
	link_init(&l->link, command->fd, command->transport);
	l->frame_size = (size_t)command->value;
	l->shared = command->flags & CRIUPY_LINK_SHARED;
	l->extended = command->flags & CRIUPY_LINK_EXTENDED;
	if (too_late(p, l)) {
		pager_publish(p);
		return;
	}
	l->out_have = 0;
	l->writable_wanted = false;
	l->saying_goodbye = false;
	l->rx.state = RX_HEADER;
	l->rx.header_have = 0;
	l->heard_ns = p->now_ns;
	l->state = CRIUPY_LINK_OPEN;
	if (l == bulk_lane(p))
		window_init(&p->window, p->config.window_pages, p->config.request_pages);
	window_begin(&p->window, p->now_ns);
	if (lane_put(l, command->preamble, command->preamble_length))
		lane_lost(p, l, ENOMEM);
	else if (epoll_ctl(p->epoll, EPOLL_CTL_ADD, command->fd, &watch) < 0)
		lane_lost(p, l, errno);
	if (p->stats.phase == CRIUPY_PHASE_RUNNING)
		lane_send_finished(p, l);
	pager_publish(p);
	for (struct task *t = p->tasks; t; t = t->next)
		task_serve_waits(p, t);
}

void lane_lost(struct criupy_pager *p, struct lane *l, int error)
{
	if (l->state != CRIUPY_LINK_OPEN)
		return;
	lane_install(p, l); /* it has come */
	l->state = CRIUPY_LINK_LOST;
	l->error = error;
	if (l->link.transport)
		l->link.transport->describe(l->link.transport,
					    l == bulk_lane(p) ? p->stats.link_fault : p->stats.urgent_fault,
					    CRIUPY_FAULT_LENGTH);
	/* The descriptor is kept: how it is closed depends on what becomes of
	 * the tasks (pager_end.c). */
	unwatch(p, l->link.fd);
	window_begin(&p->window, p->now_ns);
	lane_requests_cancel(p, l);
	if (l->rx.buffer) {
		buffer_free(p, l->rx.buffer);
		l->rx.buffer = NULL;
	}
	/* What waits for its pages may have them over the other. */
	if (bulk_lane(p)->state == CRIUPY_LINK_OPEN || urgent_lane(p)->state == CRIUPY_LINK_OPEN)
		for (struct task *t = p->tasks; t; t = t->next)
			task_serve_later(p, t);
	pager_publish(p);
}

void lane_drop(struct criupy_pager *p, struct lane *l)
{
	if (l->state != CRIUPY_LINK_LOST || p->stats.phase >= CRIUPY_PHASE_CLOSING)
		return;
	link_reset(&l->link);
	l->state = CRIUPY_LINK_NONE;
	l->error = 0;
	l->refused = 0;
	(l == bulk_lane(p) ? p->stats.link_fault : p->stats.urgent_fault)[0] = 0;
	pager_publish(p);
}

void lanes_reset(struct criupy_pager *p)
{
	for (int i = 0; i < NR_LANES; i++) {
		struct lane *l = &p->lanes[i];

		if (l->state != CRIUPY_LINK_OPEN && l->state != CRIUPY_LINK_LOST)
			continue;
		unwatch(p, l->link.fd);
		link_reset(&l->link);
		if (l->state == CRIUPY_LINK_OPEN)
			l->state = CRIUPY_LINK_RESET;
	}
}

void lane_close(struct criupy_pager *p, struct lane *l)
{
	if (l->link.fd < 0)
		return;
	unwatch(p, l->link.fd);
	/* Its end is not waited for, and no verdict hangs on it. */
	if (l->link.transport && l->state == CRIUPY_LINK_OPEN && l->rx.state != RX_FAREWELL)
		(void)l->link.transport->close_notify(l->link.transport);
	link_close(&l->link);
	lane_requests_cancel(p, l);
	if (l->state == CRIUPY_LINK_OPEN)
		l->state = CRIUPY_LINK_CLOSED;
}

bool lane_is_idle(const struct lane *l)
{
	return !l->requests.nr && l->rx.state == RX_HEADER && !l->rx.header_have;
}

/* ---- out ---------------------------------------------------------------------- */

int lane_put(struct lane *l, const void *data, size_t length)
{
	if (l->out_have + length > l->out_room) {
		size_t room = max_u64(l->out_room ? l->out_room * 2 : 4096, l->out_have + length);
		uint8_t *out = realloc(l->out, room);

		if (!out)
			return -ENOMEM;
		l->out = out;
		l->out_room = room;
	}
	if (length)
		memcpy(l->out + l->out_have, data, length);
	l->out_have += length;
	return 0;
}

int lane_put_frame(struct lane *l, const struct criupy_frame *frame)
{
	uint8_t encoded[CRIUPY_FRAME_32];

	(void)criupy_frame_encode(frame, encoded, l->frame_size);
	return lane_put(l, encoded, l->frame_size);
}

void lane_flush(struct criupy_pager *p, struct lane *l)
{
	struct epoll_event watch = { .events = EPOLLIN, .data.ptr = l };
	/* A stock source takes a frame out of one record. */
	size_t most = l->link.transport ? CRIUPY_TRANSPORT_RECORD / l->frame_size * l->frame_size : SIZE_MAX;
	bool blocked;
	ssize_t sent;
	int pushed;

	if (l->state != CRIUPY_LINK_OPEN)
		return;
	if (!l->out_have && !l->writable_wanted && !l->saying_goodbye)
		return;
	while (l->out_have) {
		sent = l->link.send(&l->link, l->out, min_u64(l->out_have, most));
		if (sent == -EINTR)
			continue;
		if (sent == -EAGAIN)
			break;
		if (sent < 0) {
			lane_lost(p, l, (int)-sent);
			return;
		}
		l->out_have -= (size_t)sent;
		memmove(l->out, l->out + sent, l->out_have);
	}
	pushed = l->saying_goodbye ? l->link.transport->close_notify(l->link.transport) : link_push(&l->link);
	if (pushed < 0 && pushed != -EAGAIN) {
		lane_abandon(p, l, -pushed);
		return;
	}
	l->saying_goodbye = l->saying_goodbye && pushed;
	blocked = l->out_have || pushed;
	if (blocked == l->writable_wanted)
		return;
	l->writable_wanted = blocked;
	if (blocked)
		watch.events |= EPOLLOUT;
	if (epoll_ctl(p->epoll, EPOLL_CTL_MOD, l->link.fd, &watch) < 0)
		lane_lost(p, l, errno);
}

void lane_send_finished(struct criupy_pager *p, struct lane *l)
{
	const struct criupy_frame frame = { .cmd = CRIUPY_CMD_FINISHED };

	if (l != bulk_lane(p) || !l->extended || l->state != CRIUPY_LINK_OPEN)
		return;
	if (lane_put_frame(l, &frame))
		lane_lost(p, l, ENOMEM);
}

void lane_send_close(struct criupy_pager *p, struct lane *l)
{
	/* A shared socket does not end by our closing it, so the source must be
	 * told not to wait for that. */
	const struct criupy_frame frame = {
		.cmd = l->shared ? CRIUPY_CMD_FORCE_CLOSE : CRIUPY_CMD_CLOSE,
	};

	l->close_sent = true;
	l->heard_ns = p->now_ns;
	l->rx.state = RX_STATUS;
	l->rx.header_have = 0;
	if (lane_put_frame(l, &frame))
		lane_lost(p, l, ENOMEM);
	lane_flush(p, l);
}
