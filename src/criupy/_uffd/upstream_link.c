/* The connection to the source: requests out, answers in, in strict order.
 *
 * An answer goes from the socket into one buffer and from there to its file, without
 * the lock; what follows from it happens under the lock, once for each receive. An
 * answer may be shorter than its request: the rest is absent again.
 *
 * Whatever is not an answer to the oldest request ends it: by a reset, after which the
 * source goes on, unless somebody else holds the socket. */

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "upstream.h"

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static struct upstream_run *oldest(struct criupy_upstream *u)
{
	return &u->requests[u->first_request];
}

/* ---- ends, all under the lock ------------------------------------------------------------ */

static void ended(struct criupy_upstream *u, uint32_t state, int error)
{
	u->stats.state = state;
	u->stats.error = error;
	while (u->nr_requests) {
		upstream_set(u, *oldest(u), UPSTREAM_ABSENT);
		u->first_request = (u->first_request + 1) % UPSTREAM_REQUESTS;
		u->nr_requests--;
	}
	upstream_tell(u, (struct upstream_run){ 0, UINT64_MAX });
	upstream_wake_fd(u->event_fd);
}

/* Somebody else who holds the socket decides what the source is told; where nobody
 * does, this is a reset. */
static void lost(struct criupy_upstream *u, int error)
{
	link_leave(&u->link);
	ended(u, CRIUPY_LINK_LOST, error);
}

/* An alert or a handshake, where a source that wants TLS begins. */
static bool looks_like_tls(const struct criupy_upstream *u)
{
	return u->stats.bytes_received == u->header_have && u->header_have >= 3 &&
	       (u->header[0] == 0x15 || u->header[0] == 0x16) && u->header[1] == 3;
}

static void bad_reply(struct criupy_upstream *u, int fault)
{
	memset(u->header + u->header_have, 0, sizeof(u->header) - u->header_have);
	(void)criupy_frame_decode(&u->stats.bad_reply, u->header, u->frame_size);
	u->stats.bad_reply_offset = u->stats.bytes_received - u->header_have;
	u->stats.reply_fault = (uint32_t)(looks_like_tls(u) ? CRIUPY_REPLY_TLS : fault);
	lost(u, EPROTO);
}

/* ---- out ------------------------------------------------------------------------------------ */

static struct criupy_frame get_of(const struct criupy_upstream *u, struct upstream_run run)
{
	const struct extent *extent;
	const struct upstream_image *image;
	uint64_t number;

	image = upstream_locate(u, run.page, &extent, &number);
	return (struct criupy_frame){
		.cmd = CRIUPY_CMD_GET,
		.nr_pages = run.nr,
		.vaddr = image_address(extent, number),
		.dst_id = image->image->id,
	};
}

static void put_frame(struct criupy_upstream *u, struct criupy_frame frame)
{
	if (!u->nr_requests)
		u->heard_ns = now_ns();
	(void)criupy_frame_encode(&frame, u->out + u->out_have, u->frame_size);
	u->out_have += u->frame_size;
}

/* Under the lock. */
static void ask(struct criupy_upstream *u)
{
	struct upstream_run run;
	bool urgent;

	while (!u->closing && u->nr_requests < UPSTREAM_REQUESTS && upstream_next(u, &run, &urgent)) {
		put_frame(u, get_of(u, run));
		u->requests[(u->first_request + u->nr_requests++) % UPSTREAM_REQUESTS] = run;
		upstream_set(u, run, UPSTREAM_ASKED);
		u->stats.nr_requests++;
		u->stats.nr_urgent += urgent;
	}
	if (u->closing && !u->close_sent && !u->nr_requests) {
		u->close_sent = true;
		u->receiver = UPSTREAM_STATUS;
		put_frame(u, (struct criupy_frame){ .cmd = CRIUPY_CMD_CLOSE });
	}
}

static int flush(struct criupy_upstream *u)
{
	while (u->out_have) {
		ssize_t sent = u->link.send(&u->link, u->out, u->out_have);

		if (sent == -EAGAIN)
			return 0;
		if (sent < 0 && sent != -EINTR)
			return (int)sent;
		if (sent > 0) {
			u->out_have -= (size_t)sent;
			memmove(u->out, u->out + sent, u->out_have);
		}
	}
	return 0;
}

/* ---- in ------------------------------------------------------------------------------------- */

static ssize_t receive(struct criupy_upstream *u)
{
	struct iovec into[2];
	size_t length = u->receiver == UPSTREAM_STATUS ? sizeof(int32_t) : u->frame_size;
	int nr = 1;

	if (u->receiver != UPSTREAM_PAYLOAD) {
		into[0] = (struct iovec){ u->header + u->header_have, length - u->header_have };
	} else {
		into[0] = (struct iovec){ u->payload + u->payload_have, u->payload_length - u->payload_have };
		/* The next header, unless it would be none. */
		if (u->nr_requests > 1)
			into[nr++] = (struct iovec){ u->header, length };
	}
	return u->link.receive(&u->link, into, nr);
}

/* The answer is whole: into its file. 0 or -errno. */
static int write_payload(struct criupy_upstream *u)
{
	const struct extent *extent;
	const struct upstream_image *image;
	const uint8_t *from = u->payload, *end = from + u->payload_length;
	uint64_t number, offset;

	image = upstream_locate(u, oldest(u)->page, &extent, &number);
	offset = upstream_offset(extent, number);
	while (from < end) {
		ssize_t done = pwrite(image->fd, from, (size_t)(end - from), (off_t)offset);

		if (done > 0) {
			from += done;
			offset += (uint64_t)done;
		} else if (!done || errno != EINTR) {
			return done ? -errno : -ENOSPC;
		}
	}
	return 0;
}

/* The rest is under the lock. */
static void end_payload(struct criupy_upstream *u, int error)
{
	struct upstream_run run = *oldest(u), came = { run.page, u->payload_length >> PAGE_SHIFT };

	u->first_request = (u->first_request + 1) % UPSTREAM_REQUESTS;
	u->nr_requests--;
	u->receiver = UPSTREAM_HEADER;
	u->stats.pages_fetched += came.nr;
	upstream_set(u, run, UPSTREAM_ABSENT);
	if (!error)
		upstream_put(u, came);
	else
		upstream_disk_failed(u, -error);
	upstream_tell(u, run);
	if (u->stats.pages_kept == u->stats.pages_total)
		upstream_wake_fd(u->event_fd);
}

static void end_header(struct criupy_upstream *u)
{
	const struct criupy_frame get = get_of(u, *oldest(u));
	struct criupy_frame reply;
	int fault;

	(void)criupy_frame_decode(&reply, u->header, u->frame_size);
	fault = criupy_reply_check(&reply, &get);
	if (fault) {
		bad_reply(u, fault);
		return;
	}
	u->header_have = 0;
	u->payload_length = reply.nr_pages << PAGE_SHIFT;
	u->payload_have = 0;
	u->receiver = UPSTREAM_PAYLOAD;
}

static void end_status(struct criupy_upstream *u)
{
	memcpy(&u->stats.close_status, u->header, sizeof(u->stats.close_status));
	/* The source waits for a FIN, and others may hold the socket. */
	(void)shutdown(u->link.fd, SHUT_RDWR);
	link_close(&u->link);
	ended(u, CRIUPY_LINK_CLOSED, 0);
}

static void take_in(struct criupy_upstream *u, uint64_t got, int write_error)
{
	u->heard_ns = now_ns();
	u->stats.bytes_received += got;
	if (u->receiver == UPSTREAM_PAYLOAD) {
		if (u->payload_have == u->payload_length)
			end_payload(u, write_error);
	} else if (u->receiver == UPSTREAM_HEADER && !u->nr_requests) {
		bad_reply(u, CRIUPY_REPLY_UNASKED);
		return;
	}
	if (u->receiver == UPSTREAM_HEADER && u->header_have == u->frame_size)
		end_header(u);
	else if (u->receiver == UPSTREAM_STATUS && u->header_have == sizeof(int32_t))
		end_status(u);
}

/* Receive once, and obey; takes the lock. */
static void hear(struct criupy_upstream *u)
{
	ssize_t got = receive(u);
	int write_error = 0;

	if (got == -EAGAIN || got == -EINTR)
		return;
	if (got > 0) {
		uint64_t paid = 0;

		if (u->receiver == UPSTREAM_PAYLOAD) {
			paid = min_u64((uint64_t)got, u->payload_length - u->payload_have);
			u->payload_have += paid;
			if (u->payload_have == u->payload_length)
				write_error = write_payload(u);
		}
		u->header_have += (uint64_t)got - paid;
	}
	pthread_mutex_lock(&u->lock);
	if (got > 0)
		take_in(u, (uint64_t)got, write_error);
	else if (u->receiver == UPSTREAM_HEADER && looks_like_tls(u))
		bad_reply(u, CRIUPY_REPLY_TLS);
	else
		lost(u, got ? (int)-got : EPIPE);
	pthread_mutex_unlock(&u->lock);
}

/* ---- the thread ------------------------------------------------------------------------------ */

/* Wait for something to do, at most until the source was silent for too long. 0 or -errno. */
static int wait_for_more(struct criupy_upstream *u, short *events)
{
	struct pollfd fds[2] = {
		{ .fd = u->link.fd, .events = (short)(POLLIN | (u->out_have ? POLLOUT : 0)) },
		{ .fd = u->command_fd, .events = POLLIN },
	};
	uint64_t timeout = u->config.link_timeout_ns, silent = now_ns() - u->heard_ns, left, drained;
	bool expects = u->nr_requests || u->close_sent;
	struct timespec most;

	if (expects && silent >= timeout)
		return -ETIMEDOUT;
	left = timeout - silent;
	most = (struct timespec){ .tv_sec = (time_t)(left / 1000000000), .tv_nsec = (long)(left % 1000000000) };
	if (ppoll(fds, 2, expects ? &most : NULL, NULL) < 0 && errno != EINTR)
		return -errno;
	/* What it was woken for is seen under the lock. */
	if (fds[1].revents && read(u->command_fd, &drained, sizeof(drained)) < 0 && errno != EAGAIN)
		return -errno;
	*events = fds[0].revents;
	return 0;
}

void *upstream_thread(void *upstream)
{
	struct criupy_upstream *u = upstream;
	short events = 0;
	int result;

	pthread_setname_np(pthread_self(), "criupy-upstream");
	for (;;) {
		pthread_mutex_lock(&u->lock);
		if (u->stats.state == CRIUPY_LINK_OPEN && (u->stopping || u->resetting)) {
			link_reset(&u->link);
			ended(u, CRIUPY_LINK_RESET, 0);
		}
		if (u->stats.state == CRIUPY_LINK_OPEN && u->leaving)
			lost(u, ECANCELED);
		if (u->stats.state != CRIUPY_LINK_OPEN)
			break;
		ask(u);
		pthread_mutex_unlock(&u->lock);
		result = flush(u);
		if (!result)
			result = wait_for_more(u, &events);
		if (result < 0) {
			pthread_mutex_lock(&u->lock);
			lost(u, -result);
			pthread_mutex_unlock(&u->lock);
		} else if (events & ~POLLOUT) {
			hear(u);
		}
	}
	pthread_mutex_unlock(&u->lock);
	return NULL;
}
