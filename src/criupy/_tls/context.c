/* The files behind a session: whom we trust, and who we are.
 *
 * What is accepted is what GnuTLS accepts for CRIU, so that a set of files works
 * with either end: a revocation list binds the CAs that it is of and others
 * need none, and a certificate's extended usage does not matter, because CRIU's
 * users give each host one certificate for both directions. */

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>

#include "session.h"

/* After so much a key is worn out (RFC 8446, 5.5: 2^24.5 full records for AES-GCM).
 * Bytes are counted and not records, so that requests for pages never get there:
 * to CRIU's page server a new key is a failure, because GnuTLS gives it EAGAIN
 * where it waits for a request. Its daemon has a case for that. */
#define BYTES_PER_KEY ((uint64_t)CRIUPY_TRANSPORT_RECORD << 23)
/* Who resumes sessions proves anew, this often at least, that its key is still its own. */
#define TICKET_LIFE (12 * 3600)

/* ---- the socket under a session --------------------------------------------------- */

/* Sealed bytes are gathered in the session, to be sent with few system calls;
 * there is always room, because who fills it looks first (session.c). */
static int bio_write(BIO *bio, const char *data, int length)
{
	struct criupy_tls_session *s = BIO_get_data(bio);

	BIO_clear_retry_flags(bio);
	if (length < 0 || (size_t)length > SESSION_OUT - s->out_end) {
		BIO_set_retry_write(bio);
		return -1;
	}
	memcpy(s->out + s->out_end, data, (size_t)length);
	s->out_end += (size_t)length;
	return length;
}

static int bio_read(BIO *bio, char *into, int room)
{
	struct criupy_tls_session *s = BIO_get_data(bio);
	ssize_t got;

	BIO_clear_retry_flags(bio);
	do
		got = recv(s->fd, into, (size_t)room, MSG_DONTWAIT);
	while (got < 0 && errno == EINTR);
	if (got > 0)
		s->answered = true;
	if (got < 0 && errno == EAGAIN)
		BIO_set_retry_read(bio);
	else if (got < 0)
		s->error = errno;
	return (int)got;
}

static long bio_control(BIO *bio, int command, long number, void *pointer)
{
	(void)bio;
	(void)number;
	(void)pointer;
	return command == BIO_CTRL_FLUSH;
}

/* ---- life ----------------------------------------------------------------------------- */

static int no_passphrase(char *into, int room, int writing, void *data)
{
	(void)into;
	(void)room;
	(void)writing;
	*(bool *)data = true;
	return -1;
}

static int configure(struct criupy_tls_context *context)
{
	SSL_CTX *ssl = context->ssl;

	if (!SSL_CTX_set_min_proto_version(ssl, TLS1_2_VERSION) ||
	    /* The fastest first: both ends are on a data path. */
	    !SSL_CTX_set_ciphersuites(ssl, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:"
					   "TLS_CHACHA20_POLY1305_SHA256") ||
	    !SSL_CTX_set_purpose(ssl, X509_PURPOSE_ANY) ||
	    /* A ticket would come where a reply is expected: only to who asks for it (tickets.c). */
	    !SSL_CTX_set_num_tickets(ssl, 0))
		return -EINVAL;
	SSL_CTX_set_session_cache_mode(ssl, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_options(ssl, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION |
				 SSL_OP_CIPHER_SERVER_PREFERENCE);
	SSL_CTX_set_mode(ssl, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_read_ahead(ssl, 1);
	SSL_CTX_set_default_read_buffer_len(ssl, SESSION_IN);
	SSL_CTX_set_verify(ssl, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, fault_verify);
	return tickets_configure(context) ? 0 : -EINVAL;
}

int criupy_tls_context_create(struct criupy_tls_context **context, int server)
{
	struct criupy_tls_context *c = calloc(1, sizeof(*c));

	if (!c)
		return -ENOMEM;
	atomic_init(&c->users, 1);
	c->bytes_per_key = BYTES_PER_KEY;
	c->ticket_life = TICKET_LIFE;
	pthread_mutex_init(&c->lock, NULL);
	c->server = server;
	c->ssl = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());
	c->socket = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "criupy");
	if (!c->ssl || !c->socket || !BIO_meth_set_write(c->socket, bio_write) ||
	    !BIO_meth_set_read(c->socket, bio_read) || !BIO_meth_set_ctrl(c->socket, bio_control) ||
	    configure(c) < 0) {
		ERR_clear_error();
		context_release(c);
		return -ENOMEM;
	}
	*context = c;
	return 0;
}

void context_release(struct criupy_tls_context *context)
{
	if (atomic_fetch_sub(&context->users, 1) != 1)
		return;
	tickets_drop(context);
	SSL_CTX_free(context->ssl);
	BIO_meth_free(context->socket);
	pthread_mutex_destroy(&context->lock);
	free(context);
}

void criupy_tls_context_destroy(struct criupy_tls_context *context)
{
	if (context)
		context_release(context);
}

void criupy_tls_context_set_bytes_per_key(struct criupy_tls_context *context, uint64_t bytes)
{
	context->bytes_per_key = bytes;
}

void criupy_tls_context_set_ticket_life(struct criupy_tls_context *context, int64_t seconds)
{
	context->ticket_life = seconds;
}

/* ---- files ------------------------------------------------------------------------------ */

int criupy_tls_context_trust(struct criupy_tls_context *context, const char *path)
{
	int ok = SSL_CTX_load_verify_file(context->ssl, path);

	ERR_clear_error();
	return ok == 1 ? 0 : -EBADMSG;
}

int criupy_tls_context_trust_system(struct criupy_tls_context *context)
{
	int ok = SSL_CTX_set_default_verify_paths(context->ssl);

	ERR_clear_error();
	return ok == 1 ? 0 : -EINVAL;
}

int criupy_tls_context_revoke(struct criupy_tls_context *context, const char *path)
{
	X509_STORE *store = SSL_CTX_get_cert_store(context->ssl);
	X509_LOOKUP *lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
	int nr = lookup ? X509_load_crl_file(lookup, path, X509_FILETYPE_PEM) : 0;

	ERR_clear_error();
	if (nr < 1)
		return -EBADMSG;
	X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
	return 0;
}

int criupy_tls_context_certificate(struct criupy_tls_context *context, const char *path)
{
	int ok = SSL_CTX_use_certificate_chain_file(context->ssl, path);
	unsigned long error = ERR_peek_last_error();

	ERR_clear_error();
	if (ok == 1)
		return 0;
	return ERR_GET_LIB(error) == ERR_LIB_SSL && ERR_GET_REASON(error) >= SSL_R_EE_KEY_TOO_SMALL &&
	       ERR_GET_REASON(error) <= SSL_R_CA_MD_TOO_WEAK ? -EKEYREJECTED : -EBADMSG;
}

int criupy_tls_context_dates(const struct criupy_tls_context *context, char *date, size_t room)
{
	const X509 *certificate = SSL_CTX_get0_certificate(context->ssl);
	const ASN1_TIME *start = X509_get0_notBefore(certificate), *end = X509_get0_notAfter(certificate);

	if (X509_cmp_current_time(end) < 0) {
		fault_date(end, date, room);
		return CRIUPY_TLS_EXPIRED;
	}
	if (X509_cmp_current_time(start) > 0) {
		fault_date(start, date, room);
		return CRIUPY_TLS_NOT_YET;
	}
	return 0;
}

int criupy_tls_context_key(struct criupy_tls_context *context, const char *path)
{
	bool asked = false;
	EVP_PKEY *key = NULL;
	BIO *file = BIO_new_file(path, "r");
	int result = 0;

	if (file)
		key = PEM_read_bio_PrivateKey(file, NULL, no_passphrase, &asked);
	BIO_free(file);
	if (!key)
		result = asked ? -ENOKEY : -EBADMSG;
	else if (SSL_CTX_use_PrivateKey(context->ssl, key) != 1 || SSL_CTX_check_private_key(context->ssl) != 1)
		result = -EKEYREJECTED;
	EVP_PKEY_free(key);
	ERR_clear_error();
	return result;
}
