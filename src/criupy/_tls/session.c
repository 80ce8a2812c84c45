/* One TLS session, from the handshake to the transport that carries pages.
 *
 * OpenSSL reads from the socket itself, ahead and into a large buffer, and
 * writes into memory: sealed records wait in the session until there are enough
 * of them or somebody flushes, so that many go with one system call. Before a
 * record is sealed there is room for it, therefore no write is ever half done
 * inside OpenSSL, and what was taken from the caller is taken for good.
 *
 * How a session ends means something to CRIU: the end of the socket without a
 * close_notify is a failure, with it all went well. So it is sent only when
 * asked for, and a session that is destroyed says nothing.
 *
 * One thread at a time: the one that handshakes hands the session over. */

#include <openssl/err.h>
#include <poll.h>
#include <sys/socket.h>

#include "session.h"

static struct criupy_tls_session *session_of(struct criupy_transport *transport)
{
	return (struct criupy_tls_session *)(void *)transport;
}

static size_t room(const struct criupy_tls_session *s)
{
	return SESSION_OUT - s->out_end;
}

/* Send what is sealed: 0 when all of it has gone, or -errno. */
static int flush(struct criupy_transport *transport)
{
	struct criupy_tls_session *s = session_of(transport);

	while (s->out_start < s->out_end) {
		ssize_t sent = send(s->fd, s->out + s->out_start, s->out_end - s->out_start,
				    MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent >= 0) {
			s->out_start += (size_t)sent;
		} else if (errno == EAGAIN) {
			transport->events = POLLOUT;
			memmove(s->out, s->out + s->out_start, s->out_end - s->out_start);
			s->out_end -= s->out_start;
			s->out_start = 0;
			return -EAGAIN;
		} else if (errno != EINTR) {
			return -errno;
		}
	}
	s->out_start = s->out_end = 0;
	return 0;
}

/* ---- the transport --------------------------------------------------------------------- */

static int failed(const struct criupy_tls_session *s)
{
	switch (s->fault) {
	case CRIUPY_TLS_CLOSED:
		return -EPIPE;
	case CRIUPY_TLS_SOCKET:
		return -s->error;
	default:
		return -EBADMSG;
	}
}

static int64_t transport_receive(struct criupy_transport *transport, void *into, size_t length)
{
	struct criupy_tls_session *s = session_of(transport);
	size_t got;
	int result;

	if (s->fault)
		return failed(s);
	if (s->ended)
		return 0;
	ERR_clear_error();
	result = SSL_read_ex(s->ssl, into, length, &got);
	s->drained = false;
	if (result == 1) {
		s->heard = true;
		return (int64_t)got;
	}
	switch (SSL_get_error(s->ssl, result)) {
	case SSL_ERROR_WANT_READ:
		s->drained = true;
		/* It may have answered something of TLS's own. */
		(void)flush(transport);
		transport->events = POLLIN | (s->out_end ? POLLOUT : 0);
		return -EAGAIN;
	case SSL_ERROR_WANT_WRITE:
		s->drained = true;
		result = flush(transport);
		transport->events = result == -EAGAIN ? POLLOUT : POLLIN | POLLOUT;
		return -EAGAIN;
	case SSL_ERROR_ZERO_RETURN:
		s->ended = true;
		return 0;
	default:
		fault_learn(s, result);
		return failed(s);
	}
}

static int64_t transport_send(struct criupy_transport *transport, const void *data, size_t length)
{
	struct criupy_tls_session *s = session_of(transport);
	size_t taken;
	int result;

	if (s->fault)
		return failed(s);
	/* Twice: a new key takes a record, too. */
	if (room(s) < 2 * SESSION_RECORD) {
		result = flush(transport);
		if (room(s) < 2 * SESSION_RECORD)
			return result < 0 ? result : -EAGAIN;
	}
	if (s->nr_sealed >= s->context->bytes_per_key && SSL_version(s->ssl) == TLS1_3_VERSION) {
		(void)SSL_key_update(s->ssl, SSL_KEY_UPDATE_NOT_REQUESTED);
		s->nr_sealed = 0;
	}
	ERR_clear_error();
	result = SSL_write_ex(s->ssl, data, length < CRIUPY_TRANSPORT_RECORD ? length : CRIUPY_TRANSPORT_RECORD,
			      &taken);
	if (result == 1) {
		s->nr_sealed += taken;
		return (int64_t)taken;
	}
	fault_learn(s, result);
	return failed(s);
}

static int transport_flush(struct criupy_transport *transport)
{
	return flush(transport);
}

static int transport_pending(struct criupy_transport *transport)
{
	return !session_of(transport)->drained;
}

static int transport_close_notify(struct criupy_transport *transport)
{
	struct criupy_tls_session *s = session_of(transport);

	if (s->fault)
		return failed(s);
	if (!s->notified) {
		if (room(s) < SESSION_RECORD && flush(transport) < 0)
			return -EAGAIN;
		ERR_clear_error();
		/* Its answer is read like everything else. */
		if (SSL_shutdown(s->ssl) < 0)
			ERR_clear_error();
		s->notified = true;
	}
	return flush(transport);
}

static void transport_describe(struct criupy_transport *transport, char *text, size_t length)
{
	(void)criupy_tls_session_fault(session_of(transport), text, length);
}

static void transport_destroy(struct criupy_transport *transport)
{
	criupy_tls_session_destroy(session_of(transport));
}

/* ---- life ---------------------------------------------------------------------------------- */

static BIO *open_socket(struct criupy_tls_session *s)
{
	BIO *bio = BIO_new(s->context->socket);

	if (bio) {
		BIO_set_data(bio, s);
		BIO_set_init(bio, 1);
	}
	return bio;
}

int criupy_tls_session_create(struct criupy_tls_session **session, struct criupy_tls_context *context,
			      int fd, const char *name)
{
	struct criupy_tls_session *s = calloc(1, sizeof(*s));
	BIO *bio;

	if (!s)
		return -ENOMEM;
	s->transport = (struct criupy_transport){
		.receive = transport_receive,
		.send = transport_send,
		.flush = transport_flush,
		.pending = transport_pending,
		.close_notify = transport_close_notify,
		.describe = transport_describe,
		.destroy = transport_destroy,
		.events = POLLIN,
	};
	s->fd = fd;
	s->context = context;
	atomic_fetch_add(&context->users, 1);
	s->ssl = SSL_new(context->ssl);
	bio = s->ssl ? open_socket(s) : NULL;
	s->name = name ? strdup(name) : NULL;
	if (!bio || (name && !s->name)) {
		BIO_free(bio);
		ERR_clear_error();
		criupy_tls_session_destroy(s);
		return -ENOMEM;
	}
	SSL_set_bio(s->ssl, bio, bio);
	SSL_set_app_data(s->ssl, s);
	if (context->server) {
		SSL_set_accept_state(s->ssl);
	} else {
		SSL_set_connect_state(s->ssl);
		tickets_offer(s);
	}
	*session = s;
	return 0;
}

void criupy_tls_session_destroy(struct criupy_tls_session *session)
{
	if (!session)
		return;
	SSL_free(session->ssl);
	tickets_settle(session);
	context_release(session->context);
	free(session->name);
	free(session);
}

int criupy_tls_session_handshake(struct criupy_tls_session *session, int *events)
{
	int result, error, sent;

	if (session->fault)
		return -EBADMSG;
	ERR_clear_error();
	result = SSL_do_handshake(session->ssl);
	error = result == 1 ? SSL_ERROR_NONE : SSL_get_error(session->ssl, result);
	if (error != SSL_ERROR_NONE && error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE)
		fault_learn(session, result);
	/* Also after a failure: the alert that tells the peer of it. */
	sent = flush(&session->transport);
	if (session->fault)
		return -EBADMSG;
	if (sent < 0 && sent != -EAGAIN) {
		session->fault = CRIUPY_TLS_SOCKET;
		session->error = -sent;
		return -EBADMSG;
	}
	if (error == SSL_ERROR_NONE && !sent)
		return 0;
	*events = sent < 0 ? POLLOUT : POLLIN;
	return -EAGAIN;
}

struct criupy_transport *criupy_tls_session_transport(struct criupy_tls_session *session)
{
	return &session->transport;
}
