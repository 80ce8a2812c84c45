/* TLS under a connection to or from a page server, as C sees it and as cffi
 * reads it: declarations only. The conventions are criupy.h's.
 *
 * X.509 both ways, from the first byte, as CRIU does it with GnuTLS: TLS 1.3, or
 * 1.2 where the peer knows no better. */

struct criupy_transport;	/* criupy.h */
struct criupy_tls_context;
struct criupy_tls_session;

/* ---- files (context.c) -------------------------------------------------------- */

int criupy_tls_context_create(struct criupy_tls_context **context, int server);
/* Sessions that are left keep what they need. */
void criupy_tls_context_destroy(struct criupy_tls_context *context);
/* Wear keys out sooner: no test sends the 128 GiB after which a new one is needed. */
void criupy_tls_context_set_bytes_per_key(struct criupy_tls_context *context, uint64_t bytes);
/* The same with how long sessions may be resumed, which is hours. */
void criupy_tls_context_set_ticket_life(struct criupy_tls_context *context, int64_t seconds);
/* Trust the CAs of a PEM file; -EBADMSG when there are none in it. */
int criupy_tls_context_trust(struct criupy_tls_context *context, const char *path);
/* Trust what the system trusts. */
int criupy_tls_context_trust_system(struct criupy_tls_context *context);
/* Refuse what a PEM revocation list names; -EBADMSG when there is none in it. */
int criupy_tls_context_revoke(struct criupy_tls_context *context, const char *path);
/* Our own certificate, with what leads to the CA behind it. -EBADMSG for what
 * is no PEM certificate, -EKEYREJECTED for one that is too weak to be used. */
int criupy_tls_context_certificate(struct criupy_tls_context *context, const char *path);
/* Whether now is when it is valid: 0, CRIUPY_TLS_EXPIRED or CRIUPY_TLS_NOT_YET,
 * and in date until when or since when. */
int criupy_tls_context_dates(const struct criupy_tls_context *context, char *date, size_t room);
/* And its key: -EBADMSG for no PEM key, -ENOKEY for one that a passphrase
 * protects, -EKEYREJECTED when it is not the certificate's. */
int criupy_tls_context_key(struct criupy_tls_context *context, const char *path);

/* ---- sessions (session.c) ------------------------------------------------------- */

/* What went wrong with a session. */
#define CRIUPY_TLS_OK 0
#define CRIUPY_TLS_CLOSED 1		/* the peer closed, without saying so in TLS */
#define CRIUPY_TLS_SOCKET 2		/* errno */
#define CRIUPY_TLS_PLAIN 3		/* what came is no TLS */
#define CRIUPY_TLS_VERSION 4		/* no common version */
#define CRIUPY_TLS_NO_CERTIFICATE 5	/* the peer's is missing */
#define CRIUPY_TLS_UNTRUSTED 6		/* from here on: what is wrong with it */
#define CRIUPY_TLS_NAME 7
#define CRIUPY_TLS_EXPIRED 8
#define CRIUPY_TLS_NOT_YET 9
#define CRIUPY_TLS_REVOKED 10
#define CRIUPY_TLS_OLD_LIST 11		/* the revocation list has expired */
#define CRIUPY_TLS_CERTIFICATE 12	/* anything else */
#define CRIUPY_TLS_ALERT 13		/* the peer said what is wrong with us */
#define CRIUPY_TLS_OTHER 14

/* A session on a connected, non-blocking socket, which stays the caller's. The
 * peer's certificate must be for name, an address or a host's name; NULL takes
 * any that is signed by a CA of ours. */
int criupy_tls_session_create(struct criupy_tls_session **session, struct criupy_tls_context *context,
			      int fd, const char *name);
/* Nothing is said to the peer: closing the socket after it is an abort. */
void criupy_tls_session_destroy(struct criupy_tls_session *session);
/* 0 when it is done, -EAGAIN when it waits for the events in *events (poll(2)),
 * -EBADMSG when it failed. */
int criupy_tls_session_handshake(struct criupy_tls_session *session, int *events);
/* A CRIUPY_TLS_* of the failure, and in text what is to be said of it. */
int criupy_tls_session_fault(const struct criupy_tls_session *session, char *text, size_t room);
/* Such as "TLSv1.3, TLS_AES_128_GCM_SHA256, CN = name", with ", resumed" behind it if
 * it was; once the handshake is done. */
void criupy_tls_session_describe(const struct criupy_tls_session *session, char *text, size_t room);
/* What criupy_pager_set_link and criupy_server_serve take; who takes it owns
 * the session. */
struct criupy_transport *criupy_tls_session_transport(struct criupy_tls_session *session);
