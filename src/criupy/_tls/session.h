/* What the files of the TLS extension share and Python never sees. */

#ifndef CRIUPY_TLS_SESSION_H
#define CRIUPY_TLS_SESSION_H

#include <errno.h>
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

struct criupy_tls_context {
	SSL_CTX *ssl;
	BIO_METHOD *socket;
	uint64_t bytes_per_key;
	bool server;
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
/* A date of a certificate. */
void fault_date(const ASN1_TIME *when, char *into, size_t room);

#endif
