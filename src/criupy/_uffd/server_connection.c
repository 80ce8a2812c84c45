/* One connection of the page server, on a thread of its own.
 *
 * A client that neither sends nor takes costs its own thread and two small
 * buffers, and no other client anything. All requests that have arrived are
 * answered, in order, before more are received.
 *
 * What ends it is found out here and told in the account. Whatever it is, images
 * that are given out are only read: a client can come again. An upload counts
 * when its CLOSE was answered with 0. */

#include "server.h"

int connection_fail(struct connection *c, uint32_t reason, int error)
{
	c->counted.reason = reason;
	c->counted.error = error;
	return -1;
}

int connection_flush(struct connection *c, bool more)
{
	const struct served_image *served = c->in_out;
	uint64_t nr_pages = c->out_pages;
	size_t length = c->out_length;

	c->out_length = 0;
	c->out_pages = 0;
	c->in_out = NULL;
	if (served && check_unchanged(c, served) < 0)
		return -1;
	if (!length)
		return more ? 0 : stream_flush(c);
	if (stream_send(c, c->out, length, more) < 0)
		return -1;
	connection_sent(c, nr_pages);
	return 0;
}

void connection_sent(struct connection *c, uint64_t nr_pages)
{
	c->counted.nr_pages += nr_pages;
	if (!nr_pages || c->counted.first_ns)
		return;
	c->counted.first_ns = server_now_ns();
	connection_publish(c);
	server_wake(c->server);
}

/* The peer broke the rules: what it had asked for before it gets, unless it takes
 * too long, or sends more (closing a socket with something unread resets it). */
static void answer_the_rest(struct connection *c)
{
	struct criupy_served found = c->counted;

	if (found.reason < CRIUPY_SERVED_COMMAND)
		return;
	(void)connection_flush(c, false);
	found.nr_pages = c->counted.nr_pages;
	found.first_ns = c->counted.first_ns;
	c->counted = found;
}

/* How long the next receive may take: for the rest of a frame that began only so
 * long in all, otherwise longer. Who dumps, and who restores, connects first and
 * has much to do before the first page. */
static int arm(struct connection *c)
{
	const struct criupy_server_config *config = &c->server->config;
	uint64_t passed;

	if (c->in_start == c->in_end && !c->closing) {
		c->partial_ns = 0;
		c->timeout_ns = c->begun ? config->idle_timeout_ns : config->first_timeout_ns;
		return 0;
	}
	if (!c->partial_ns)
		c->partial_ns = server_now_ns();
	passed = server_now_ns() - c->partial_ns;
	if (passed >= config->stall_timeout_ns)
		return connection_fail(c, CRIUPY_SERVED_STALLED, 0);
	c->timeout_ns = config->stall_timeout_ns - passed;
	return 0;
}

void connection_publish(struct connection *c)
{
	pthread_mutex_lock(&c->server->lock);
	c->account = c->counted;
	pthread_mutex_unlock(&c->server->lock);
}

int connection_ask(struct connection *c, const struct criupy_frame *frame, const uint8_t *body, bool ends)
{
	const struct upload *u = c->upload;
	bool is_answered;

	pthread_mutex_lock(&c->server->lock);
	c->question = (struct criupy_question){
		.serial = c->counted.serial,
		.frame = *frame,
		.frame_size = c->counted.frame_size,
	};
	if (body)
		memcpy(c->question.hello, body, sizeof(c->question.hello));
	if (u && ends) {
		c->question.nr_entries = u->nr;
		c->question.starts = u->starts;
		c->question.nr_pages = u->nr_pages;
		c->question.flags = u->flags;
	}
	c->account = c->counted;
	c->asking = ASKS;
	server_wake(c->server);
	while (c->asking != IS_ANSWERED && !c->cut)
		pthread_cond_wait(&c->answered, &c->server->lock);
	is_answered = c->asking == IS_ANSWERED;
	c->asking = ASKS_NOTHING;
	pthread_mutex_unlock(&c->server->lock);
	return is_answered ? 0 : connection_fail(c, CRIUPY_SERVED_CUT, 0);
}

/* Receive more. 1 when something came, 0 at the peer's end, -1. */
static int receive(struct connection *c)
{
	ssize_t got;

	if (c->in_start == c->in_end) {
		c->in_start = c->in_end = 0;
	} else if (c->in_end == SERVER_IN) {
		memmove(c->in, c->in + c->in_start, c->in_end - c->in_start);
		c->in_end -= c->in_start;
		c->in_start = 0;
	}
	if (arm(c) < 0)
		return -1;
	got = stream_receive(c, c->in + c->in_end, SERVER_IN - c->in_end);
	c->unchanged = NULL;
	if (got > 0) {
		c->in_end += (size_t)got;
		c->counted.bytes_received += (uint64_t)got;
	}
	if (got < 0 && c->counted.reason == CRIUPY_SERVED_STALLED && !c->partial_ns)
		c->counted.reason = CRIUPY_SERVED_IDLE;
	return got < 0 ? -1 : got > 0;
}

static int learn_frame_size(struct connection *c)
{
	const uint8_t *head = c->in + c->in_start;
	int size = criupy_frame_detect(head);

	/* The first record of a handshake. */
	if (size < 0 && !c->transport && head[0] == 0x16 && head[1] == 3)
		return connection_fail(c, CRIUPY_SERVED_SPEAKS_TLS, 0);
	if (size < 0) {
		criupy_frame_decode(&c->counted.frame, c->in + c->in_start, CRIUPY_FRAME_24);
		return connection_fail(c, CRIUPY_SERVED_COMMAND, 0);
	}
	c->frame_size = size ? (size_t)size : CRIUPY_FRAME_24;
	c->counted.frame_size = (uint32_t)size;
	return 0;
}

/* After CLOSE: the status, then nothing but the peer's end may come, and soon.
 * After FORCE_CLOSE not even that: it says that others hold the peer's socket. */
static int close_session(struct connection *c, int32_t status, bool force)
{
	/* A leading CLOSE may be the long one. */
	const size_t longer = c->counted.frame_size ? 0 : CRIUPY_FRAME_32 - CRIUPY_FRAME_24;
	size_t rest = longer;
	int got;

	memcpy(c->out + c->out_length, &status, sizeof(status));
	c->out_length += sizeof(status);
	if (connection_flush(c, false) < 0)
		return -1;
	c->closing = true;
	do {
		if (c->in_end - c->in_start > rest)
			return connection_fail(c, CRIUPY_SERVED_TRAILING, 0);
		rest -= c->in_end - c->in_start;
		c->in_start = c->in_end;
		got = force && !rest ? 0 : receive(c);
	} while (got > 0);
	/* To an ABORT it says what has become of the source, and nothing failed. */
	if (status && (c->counted.frame.cmd & CRIUPY_CMD_MASK) != CRIUPY_CMD_ABORT)
		return connection_fail(c, CRIUPY_SERVED_REFUSED, -status);
	if (rest && rest < longer)	/* a part of the longer one */
		return connection_fail(c, CRIUPY_SERVED_TRAILING, 0);
	/* However it went away: it has what it wanted. */
	return connection_fail(c, CRIUPY_SERVED_CLOSED, 0);
}

/* How a session ends: the status is answered, then the peer is waited for. */
static int end(struct connection *c, const struct criupy_frame *frame)
{
	bool force = (frame->cmd & CRIUPY_CMD_MASK) == CRIUPY_CMD_FORCE_CLOSE;
	int32_t status;

	if ((c->server->config.receives ? receive_close(c, frame, &status) : session_end(c, frame, &status)) < 0)
		return -1;
	if (c->out_length + sizeof(status) > SERVER_OUT && connection_flush(c, true) < 0)
		return -1;
	return close_session(c, status, force);
}

/* Whether a frame is the first by which a client wants to be the destination. Who
 * uploads is none, and ends here without a question. */
static bool claims(const struct connection *c, uint32_t cmd)
{
	switch (cmd) {
	case CRIUPY_CMD_GET:
		return !c->claimed;
	case CRIUPY_CMD_GETV:
		return !c->claimed && c->extended;
	case CRIUPY_CMD_CLOSE:
	case CRIUPY_CMD_FORCE_CLOSE:
		return !c->claimed && !c->extended;
	}
	return false;
}

static int dispatch(struct connection *c, const struct criupy_frame *frame, const uint8_t *body)
{
	bool receives = c->server->config.receives;
	uint32_t cmd = frame->cmd & CRIUPY_CMD_MASK;

	if (cmd == CRIUPY_CMD_HELLO)
		return session_hello(c, frame, body);
	c->begun = true;
	if (cmd == CRIUPY_CMD_FINISHED)
		return session_finished(c, frame);
	c->counted.nr_requests++;
	c->begun = true;
	if (claims(c, cmd) && session_claim(c, frame) < 0)
		return -1;
	switch (cmd) {
	case CRIUPY_CMD_ABORT:
		if (receives)
			break;
		return end(c, frame);
	case CRIUPY_CMD_CLOSE:
	case CRIUPY_CMD_FORCE_CLOSE:
		return end(c, frame);
	case CRIUPY_CMD_GET:
		if (!receives)
			return answer_get(c, frame);
		break;
	case CRIUPY_CMD_GETV:
		if (c->extended)
			return answer_getv(c, frame, body);
		break;
	case CRIUPY_CMD_OPEN:
	case CRIUPY_CMD_OPEN2:
		if (receives)
			return receive_open(c, frame);
		break;
	case CRIUPY_CMD_PARENT:
		if (receives)
			return receive_parent(c, frame);
		break;
	case CRIUPY_CMD_ADD:
	case CRIUPY_CMD_ADD_F:
	case CRIUPY_CMD_HOLE:
		if (receives)
			return receive_add(c, frame);
		break;
	}
	return connection_fail(c, CRIUPY_SERVED_COMMAND, 0);
}

/* What follows a frame and belongs to it; a HELLO or GETV that cannot be has -1. */
static int body_length(const struct connection *c, const struct criupy_frame *frame, size_t *length)
{
	*length = 0;
	switch (frame->cmd & CRIUPY_CMD_MASK) {
	case CRIUPY_CMD_HELLO:
		if (c->begun)
			return 0;
		*length = CRIUPY_HELLO_LENGTH;
		return frame->nr_pages == CRIUPY_HELLO_LENGTH ? 0 : -1;
	case CRIUPY_CMD_GETV:
		if (!c->extended)
			return 0;
		*length = (size_t)frame->vaddr * CRIUPY_RUN_LENGTH;
		return frame->vaddr && frame->vaddr <= CRIUPY_MAX_RUNS ? 0 : -1;
	}
	return 0;
}

/* Obey the next frame: 1, 0 when the rest of it has yet to come, -1. */
static int obey(struct connection *c)
{
	struct criupy_frame frame;
	const uint8_t *body;
	size_t length;
	int result;

	criupy_frame_decode(&frame, c->in + c->in_start, c->frame_size);
	result = body_length(c, &frame, &length);
	if (!result && c->in_end - c->in_start < c->frame_size + length)
		return 0;
	body = c->in + c->in_start + c->frame_size;
	c->counted.frame = frame;
	c->counted.offset = c->offset;
	if (result)
		return connection_fail(c, CRIUPY_SERVED_COUNT, 0);
	c->in_start += c->frame_size + length;
	c->offset += c->frame_size + length;
	c->partial_ns = 0;
	result = dispatch(c, &frame, body);
	return result < 0 ? -1 : 1;
}
void connection_serve(struct connection *c)
{
	for (;;) {
		int got = receive(c);

		if (got < 0)
			return;
		if (!got) {
			connection_fail(c, c->in_start == c->in_end ? CRIUPY_SERVED_EOF : CRIUPY_SERVED_TRUNCATED, 0);
			return;
		}
		if (!c->frame_size && c->in_end - c->in_start >= CRIUPY_FRAME_24 && learn_frame_size(c) < 0)
			return;
		while (c->frame_size && c->in_end - c->in_start >= c->frame_size && (got = obey(c)))
			if (got < 0) {
				answer_the_rest(c);
				return;
			}
		if (connection_flush(c, false) < 0)
			return;
		connection_publish(c);
	}
}
