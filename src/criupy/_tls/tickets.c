/* Sessions that are resumed: who comes back proves to be who was there before,
 * and both ends save the certificates and what proves them.
 *
 * Only in TLS 1.3, and with fresh (EC)DHE keys, so that a ticket that gets lost
 * opens nothing that was recorded.
 *
 * A server of ours sends tickets only where it was asked to with ticket_request
 * (RFC 9149), as our client does. GnuTLS does not know it and would be given
 * tickets unasked: for one of them it says EAGAIN, which CRIU takes for a failure
 * wherever it blocks. A server that does not know the extension ignores it.
 *
 * A resumed session looks at no certificate, which must let nobody in whom a
 * full handshake would refuse. So a ticket holds the peer's certificate and until
 * when everything that was looked at is good: the chain, the revocation lists,
 * and some hours at most, however often it is renewed. One that is too old, or
 * whose certificate is for another name, is ignored: the full handshake that
 * comes instead decides, and has the words for it. The files of a context are
 * read once, for full handshakes as well, and its tickets end with it: a new
 * list or CA needs a new context, to which no ticket of the old one means anything. */

#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <time.h>

#include "session.h"

/* RFC 9149; the first number is for a full handshake, the second for a resumed one. */
#define TICKET_REQUEST 58
/* One is used up by each connection, which may break before its own has come. */
static const unsigned char WANTED[] = {2, 1};

/* ---- how long ------------------------------------------------------------------------ */

static int64_t seconds_to(const ASN1_TIME *when)
{
	int days, seconds;

	if (ASN1_TIME_diff(&days, &seconds, NULL, when) != 1)
		return 0;
	return (int64_t)days * 86400 + seconds;
}

static int64_t sooner(int64_t one, int64_t other)
{
	return one < other ? one : other;
}

void tickets_verified(struct criupy_tls_session *s, X509_STORE_CTX *store)
{
	STACK_OF(X509) *chain = X509_STORE_CTX_get0_chain(store);
	int64_t left = s->context->ticket_life;

	for (int i = 0; i < sk_X509_num(chain); i++) {
		X509 *certificate = sk_X509_value(chain, i);
		STACK_OF(X509_CRL) *lists = X509_STORE_CTX_get1_crls(store, X509_get_issuer_name(certificate));

		left = sooner(left, seconds_to(X509_get0_notAfter(certificate)));
		for (int j = 0; j < sk_X509_CRL_num(lists); j++) {
			const ASN1_TIME *next = X509_CRL_get0_nextUpdate(sk_X509_CRL_value(lists, j));

			if (next)
				left = sooner(left, seconds_to(next));
		}
		sk_X509_CRL_pop_free(lists, X509_CRL_free);
	}
	s->good_until = time(NULL) + left;
}

/* ---- the client's ------------------------------------------------------------------------ */

static bool same(const char *one, const char *other)
{
	return one && other ? !strcmp(one, other) : one == other;
}

static void drop(struct ticket *ticket)
{
	SSL_SESSION_free(ticket->session);
	free(ticket->name);
}

static struct ticket take_out(struct criupy_tls_context *c, unsigned index)
{
	struct ticket ticket = c->tickets[index];

	c->nr_tickets--;
	memmove(&c->tickets[index], &c->tickets[index + 1], (c->nr_tickets - index) * sizeof(ticket));
	return ticket;
}

static void put(struct criupy_tls_context *c, struct ticket ticket)
{
	struct ticket oldest = {0};

	pthread_mutex_lock(&c->lock);
	if (c->nr_tickets == CONTEXT_TICKETS)
		oldest = take_out(c, 0);
	c->tickets[c->nr_tickets++] = ticket;
	pthread_mutex_unlock(&c->lock);
	drop(&oldest);
}

/* A ticket has come, on the thread that receives. */
static int keep(SSL *ssl, SSL_SESSION *session)
{
	struct criupy_tls_session *s = SSL_get_app_data(ssl);
	struct ticket ticket = {.good_until = s->good_until};

	if (SSL_version(ssl) != TLS1_3_VERSION || !SSL_SESSION_is_resumable(session))
		return 0;
	/* A copy: when a connection breaks OpenSSL resumes its session no more,
	 * and that is when it is needed. */
	ticket.session = SSL_SESSION_dup(session);
	ticket.name = s->name ? strdup(s->name) : NULL;
	if (!ticket.session || (s->name && !ticket.name)) {
		drop(&ticket); /* at the price of a full handshake */
		return 0;
	}
	put(s->context, ticket);
	return 0;
}

void tickets_offer(struct criupy_tls_session *s)
{
	struct criupy_tls_context *c = s->context;
	struct ticket ticket = {0};

	pthread_mutex_lock(&c->lock);
	for (unsigned i = c->nr_tickets; i-- && !ticket.session;)
		if (same(c->tickets[i].name, s->name))
			ticket = take_out(c, i);
	pthread_mutex_unlock(&c->lock);
	if (ticket.session && time(NULL) < ticket.good_until && SSL_set_session(s->ssl, ticket.session)) {
		s->good_until = ticket.good_until;
		s->offered = ticket;
	} else {
		drop(&ticket);
	}
}

void tickets_settle(struct criupy_tls_session *s)
{
	if (s->offered.session && !s->answered)
		put(s->context, s->offered);
	else
		drop(&s->offered);
}

static int ask(SSL *ssl, unsigned type, unsigned where, const unsigned char **out, size_t *length, X509 *x,
	       size_t chain_index, int *alert, void *argument)
{
	(void)ssl, (void)type, (void)where, (void)x, (void)chain_index, (void)alert, (void)argument;
	*out = WANTED;
	*length = sizeof(WANTED);
	return 1;
}

/* ---- the server's ------------------------------------------------------------------------- */

static int look_at_hello(SSL *ssl, int *alert, void *argument)
{
	const unsigned char *asked;
	size_t length;

	(void)alert, (void)argument;
	if (SSL_client_hello_get0_ext(ssl, TICKET_REQUEST, &asked, &length) == 1 && length == sizeof(WANTED)) {
		(void)SSL_clear_options(ssl, SSL_OP_NO_TICKET);
		(void)SSL_set_num_tickets(ssl, asked[0] < WANTED[0] ? asked[0] : WANTED[0]);
	}
	return SSL_CLIENT_HELLO_SUCCESS;
}

static int write_ticket(SSL *ssl, void *argument)
{
	const struct criupy_tls_session *s = SSL_get_app_data(ssl);
	SSL_SESSION *session = SSL_get_session(ssl);
	int64_t left = s->good_until - time(NULL);

	(void)argument;
	return SSL_SESSION_set_timeout(session, left > 0 ? left : 0) &&
	       SSL_SESSION_set1_ticket_appdata(session, &s->good_until, sizeof(s->good_until));
}

static bool is_good(struct criupy_tls_session *s, SSL_SESSION *session)
{
	X509 *certificate = SSL_SESSION_get0_peer(session);
	void *data = NULL;
	size_t length = 0;

	if (!certificate || !SSL_SESSION_get0_ticket_appdata(session, &data, &length) ||
	    length != sizeof(s->good_until))
		return false;
	memcpy(&s->good_until, data, length);
	return time(NULL) < s->good_until && (!s->name || fault_is_for(certificate, s->name));
}

static SSL_TICKET_RETURN read_ticket(SSL *ssl, SSL_SESSION *session, const unsigned char *key, size_t length,
				     SSL_TICKET_STATUS status, void *argument)
{
	(void)key, (void)length, (void)argument;
	if ((status == SSL_TICKET_SUCCESS || status == SSL_TICKET_SUCCESS_RENEW) &&
	    is_good(SSL_get_app_data(ssl), session))
		return SSL_TICKET_RETURN_USE_RENEW;
	return SSL_TICKET_RETURN_IGNORE_RENEW;
}

/* ---- life ------------------------------------------------------------------------------------ */

/* OpenSSL shows a server no extension that nobody knows; a client's may be answered.
 * If one day OpenSSL has it itself, it asks as it likes. */
static bool know_request(SSL_CTX *ssl, unsigned where, SSL_custom_ext_add_cb_ex add)
{
	return SSL_extension_supported(TICKET_REQUEST) ||
	       SSL_CTX_add_custom_ext(ssl, TICKET_REQUEST, where | SSL_EXT_TLS1_3_ONLY, add, NULL, NULL, NULL, NULL);
}

bool tickets_configure(struct criupy_tls_context *context)
{
	static const unsigned char end[] = "criupy page server";
	SSL_CTX *ssl = context->ssl;

	if (context->server) {
		SSL_CTX_set_client_hello_cb(ssl, look_at_hello, NULL);
		return know_request(ssl, SSL_EXT_CLIENT_HELLO, NULL) &&
		       SSL_CTX_set_session_id_context(ssl, end, sizeof(end) - 1) &&
		       SSL_CTX_set_session_ticket_cb(ssl, write_ticket, read_ticket, NULL);
	}
	SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
	SSL_CTX_sess_set_new_cb(ssl, keep);
	return know_request(ssl, SSL_EXT_CLIENT_HELLO | SSL_EXT_TLS1_3_ENCRYPTED_EXTENSIONS, ask);
}

void tickets_drop(struct criupy_tls_context *context)
{
	while (context->nr_tickets)
		drop(&context->tickets[--context->nr_tickets]);
}
