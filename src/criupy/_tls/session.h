/* What the files of the TLS extension share and Python never sees. */

#ifndef CRIUPY_TLS_SESSION_H
#define CRIUPY_TLS_SESSION_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/ssl.h>

#include "criupy.h"
#include "tls.h"

/* Sealed records that are sent at once. */
#define SESSION_OUT (256u << 10)
/* A record is longer sealed than open; 256 is what any cipher adds at most. */
#define SESSION_RECORD (CRIUPY_TRANSPORT_RECORD + 256u + 5u)
/* What is received at once. */
#define SESSION_IN (128u << 10)

/* So many tickets a client keeps: some for each lane of a connection. */
#define CONTEXT_TICKETS 4

struct ticket {
	SSL_SESSION *session;		/* which nobody else has */
	char *name;			/* whose it is, as in the session below */
	int64_t good_until;		/* time(2): what was verified may not be later */
};

struct criupy_tls_context {
	SSL_CTX *ssl;
	BIO_METHOD *socket;
	uint64_t bytes_per_key;
	int64_t ticket_life;		/* seconds */
	bool server;
	pthread_mutex_t lock;		/* tickets: they come where pages are received, and go in Python */
	unsigned nr_tickets;
	struct ticket tickets[CONTEXT_TICKETS];	/* the newest last */
	_Atomic unsigned users;		/* Python's and one a session */
};

void context_release(struct criupy_tls_context *context);

struct criupy_tls_session {
	struct criupy_transport transport;	/* first: it is what others have */
	struct criupy_tls_context *context;
	SSL *ssl;
	int fd;
	int fault;			/* CRIUPY_TLS_*; nothing works after it */
	int error;			/* errno of CRIUPY_TLS_SOCKET */
	char *name;			/* the peer's, NULL: any */
	struct ticket offered;		/* to a server, to be resumed */
	bool answered;			/* something came from the peer */
	int64_t good_until;		/* of the tickets that come of it */
	bool drained;			/* the socket had no more last time */
	bool ended;			/* the peer's close_notify was read */
	bool notified;			/* ours is on its way */
	bool heard;			/* something came after the handshake */
	uint64_t nr_sealed;		/* bytes, with the key in use */
	size_t out_start, out_end;
	char text[512];			/* of the fault */
	uint8_t out[SESSION_OUT];
};

/* ---- fault.c: words for what went wrong ------------------------------------------ */

/* Take note of why OpenSSL's last call on the session failed. */
void fault_learn(struct criupy_tls_session *s, int result);
/* OpenSSL's verify callback. */
int fault_verify(int ok, X509_STORE_CTX *store);
/* Whether a certificate is for an address or a host's name. */
bool fault_is_for(X509 *certificate, const char *name);
/* A date of a certificate. */
void fault_date(const ASN1_TIME *when, char *into, size_t room);

/* ---- tickets.c: sessions that are resumed ---------------------------------------- */

bool tickets_configure(struct criupy_tls_context *context);
/* The peer's certificate is good; see how long. */
void tickets_verified(struct criupy_tls_session *s, X509_STORE_CTX *store);
/* Resume a session with this peer, if there is one. */
void tickets_offer(struct criupy_tls_session *s);
/* At its end: the ticket is used up, unless nobody was there to use it. */
void tickets_settle(struct criupy_tls_session *s);
void tickets_drop(struct criupy_tls_context *context);

#endif
