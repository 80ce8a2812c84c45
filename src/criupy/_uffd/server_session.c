/* What a connection says of itself beyond CRIU's protocol, and what a server that
 * asks is told before it serves: which session a connection belongs to, that the
 * restore has finished, how the session ends.
 *
 * A client of ours begins with HELLO, a stock one with what it wants. Nothing that
 * is not HELLO makes a connection extended, so that a stock client is never sent
 * what it does not know. */

#include "server.h"

#define FAREWELL_NS UINT64_C(1000000000)

/* Closing a socket with something unread resets it, and what was said last may be
 * lost: so the peer, who has asked for more meanwhile, is read until it goes. */
static void say_refused(struct connection *c, uint32_t reason)
{
	const struct criupy_frame frame = { .cmd = CRIUPY_CMD_REFUSED, .nr_pages = reason };
	uint64_t until = server_now_ns() + FAREWELL_NS, now;

	if (connection_flush(c, true) < 0)
		return;
	criupy_frame_encode(&frame, c->out, CRIUPY_FRAME_32);
	c->out_length = CRIUPY_FRAME_32;
	if (connection_flush(c, false) < 0)
		return;
	while ((now = server_now_ns()) < until) {
		c->timeout_ns = until - now;
		if (stream_receive(c, c->in, SERVER_IN) <= 0)
			return;
	}
}

int session_refuse(struct connection *c, uint32_t reason)
{
	if (c->extended)
		say_refused(c, reason);
	return connection_fail(c, CRIUPY_SERVED_REFUSED, (int)reason);
}

int session_gone(struct connection *c)
{
	struct criupy_served found = c->counted;

	if (c->extended && found.reason == CRIUPY_SERVED_GONE) {
		say_refused(c, found.error == ESHUTDOWN ? CRIUPY_REFUSED_ENDED : CRIUPY_REFUSED_GONE);
		c->counted.reason = found.reason;
		c->counted.error = found.error;
	}
	return -1;
}

int session_hello(struct connection *c, const struct criupy_frame *frame, const uint8_t *body)
{
	if (c->begun || c->server->config.receives || c->frame_size != CRIUPY_FRAME_32)
		return connection_fail(c, CRIUPY_SERVED_COMMAND, 0);
	c->extended = true;
	c->begun = true;
	if (!c->server->config.asks)
		return 0;
	if (connection_ask(c, frame, body, false) < 0)
		return -1;
	return c->answer < 0 ? session_refuse(c, (uint32_t)-c->answer) : 0;
}

int session_claim(struct connection *c, const struct criupy_frame *frame)
{
	c->claimed = true;
	if (!c->server->config.asks)
		return 0;
	if (connection_ask(c, frame, NULL, false) < 0)
		return -1;
	return c->answer < 0 ? session_refuse(c, (uint32_t)-c->answer) : 0;
}

int session_finished(struct connection *c, const struct criupy_frame *frame)
{
	if (!c->extended)
		return connection_fail(c, CRIUPY_SERVED_COMMAND, 0);
	if (!c->server->config.asks)
		return 0;
	if (connection_ask(c, frame, NULL, false) < 0)
		return -1;
	return c->answer < 0 ? session_refuse(c, (uint32_t)-c->answer) : 0;
}

int session_end(struct connection *c, const struct criupy_frame *frame, int32_t *status)
{
	if ((frame->cmd & CRIUPY_CMD_MASK) == CRIUPY_CMD_ABORT && !c->extended)
		return connection_fail(c, CRIUPY_SERVED_COMMAND, 0);
	/* Images have no source that could go on. */
	*status = (frame->cmd & CRIUPY_CMD_MASK) == CRIUPY_CMD_ABORT ? -EALREADY : 0;
	if (!c->server->config.asks)
		return 0;
	/* What was asked for before goes out first: the answer may take a while. */
	if (connection_flush(c, false) < 0 || connection_ask(c, frame, NULL, false) < 0)
		return -1;
	*status = c->answer;
	return 0;
}
