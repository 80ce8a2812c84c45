/* What went wrong with a session, in words for a person.
 *
 * Each is the rest of a sentence that begins with who the peer is. Names out of
 * certificates are the peer's choice, so control characters are escaped. */

#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdarg.h>
#include <stdio.h>

#include "session.h"

/* No line break, nothing that a terminal obeys; UTF-8 as it is. */
#define NAME_FLAGS ((XN_FLAG_ONELINE | ASN1_STRFLGS_ESC_CTRL | ASN1_STRFLGS_UTF8_CONVERT) & \
		    ~(unsigned long)ASN1_STRFLGS_ESC_MSB)

__attribute__((format(printf, 3, 4)))
static void say(struct criupy_tls_session *s, int fault, const char *format, ...)
{
	va_list arguments;

	s->fault = fault;
	va_start(arguments, format);
	(void)vsnprintf(s->text, sizeof(s->text), format, arguments);
	va_end(arguments);
	/* Some of it may be the peer's. */
	for (char *c = s->text; *c; c++)
		if ((unsigned char)*c < ' ' || *c == 0x7f)
			*c = '?';
}

/* ---- certificates ------------------------------------------------------------------ */

static void take(BIO *memory, char *into, size_t room)
{
	int got = memory ? BIO_read(memory, into, (int)room - 1) : 0;

	into[got > 0 ? got : 0] = '\0';
	BIO_free(memory);
}

static void subject_of(X509 *certificate, char *into, size_t room)
{
	BIO *memory = BIO_new(BIO_s_mem());

	if (memory && certificate)
		X509_NAME_print_ex(memory, X509_get_subject_name(certificate), 0, NAME_FLAGS);
	take(memory, into, room);
}

static void names_of(X509 *certificate, char *into, size_t room)
{
	GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
	BIO *memory = BIO_new(BIO_s_mem());

	if (memory && names)
		for (int i = 0; i < sk_GENERAL_NAME_num(names); i++) {
			if (i)
				BIO_puts(memory, ", ");
			GENERAL_NAME_print(memory, sk_GENERAL_NAME_value(names, i));
		}
	take(memory, into, room);
	GENERAL_NAMES_free(names);
	if (!*into)
		subject_of(certificate, into, room);
}

void fault_date(const ASN1_TIME *when, char *into, size_t room)
{
	struct tm tm;

	if (!when || ASN1_TIME_to_tm(when, &tm) != 1 || !strftime(into, room, "%Y-%m-%d %H:%M:%S UTC", &tm))
		(void)snprintf(into, room, "an unknown time");
}

/* As GnuTLS does it for CRIU: an address may also stand where a name should. */
bool fault_is_for(X509 *certificate, const char *name)
{
	return X509_check_ip_asc(certificate, name, 0) == 1 ||
	       X509_check_host(certificate, name, 0, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS, NULL) == 1;
}

static void learn_certificate(struct criupy_tls_session *s, X509_STORE_CTX *store, int error)
{
	X509 *certificate = X509_STORE_CTX_get_current_cert(store);
	X509_CRL *list = X509_STORE_CTX_get0_current_crl(store);
	const char *whose = X509_STORE_CTX_get_error_depth(store) ? "the CA of its certificate" : "its certificate";
	char subject[160], other[256];

	subject_of(certificate, subject, sizeof(subject));
	switch (error) {
	case X509_V_ERR_CERT_HAS_EXPIRED:
		fault_date(X509_get0_notAfter(certificate), other, sizeof(other));
		say(s, CRIUPY_TLS_EXPIRED, "%s (%s) has expired on %s", whose, subject, other);
		break;
	case X509_V_ERR_CERT_NOT_YET_VALID:
		fault_date(X509_get0_notBefore(certificate), other, sizeof(other));
		say(s, CRIUPY_TLS_NOT_YET, "%s (%s) is not valid before %s; are the clocks right?", whose, subject,
		    other);
		break;
	case X509_V_ERR_CERT_REVOKED:
		say(s, CRIUPY_TLS_REVOKED, "%s (%s) has been revoked", whose, subject);
		break;
	case X509_V_ERR_CRL_HAS_EXPIRED:
		fault_date(list ? X509_CRL_get0_nextUpdate(list) : NULL, other, sizeof(other));
		say(s, CRIUPY_TLS_OLD_LIST, "our revocation list for its certificate (%s) has expired on %s", subject,
		    other);
		break;
	case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
	case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
	case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
	case X509_V_ERR_CERT_SIGNATURE_FAILURE:
	case X509_V_ERR_CERT_UNTRUSTED:
		say(s, CRIUPY_TLS_UNTRUSTED, "%s (%s) is not signed by a CA that is trusted here", whose, subject);
		break;
	default:
		say(s, CRIUPY_TLS_CERTIFICATE, "%s (%s) is not accepted: %s", whose, subject,
		    X509_verify_cert_error_string(error));
	}
}

int fault_verify(int ok, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct criupy_tls_session *s = SSL_get_app_data(ssl);
	X509 *certificate = X509_STORE_CTX_get_current_cert(store);
	int error = X509_STORE_CTX_get_error(store);
	char names[320];

	if (!ok && error == X509_V_ERR_UNABLE_TO_GET_CRL) {
		X509_STORE_CTX_set_error(store, X509_V_OK);
		return 1;
	}
	if (!ok) {
		learn_certificate(s, store, error);
		return 0;
	}
	if (X509_STORE_CTX_get_error_depth(store))
		return 1;
	if (!s->name || fault_is_for(certificate, s->name)) {
		tickets_verified(s, store);
		return 1;
	}
	names_of(certificate, names, sizeof(names));
	say(s, CRIUPY_TLS_NAME, "its certificate is for %s and not for %s (--tls-no-cn-verify)", names, s->name);
	X509_STORE_CTX_set_error(store, X509_V_ERR_HOSTNAME_MISMATCH);
	return 0;
}

/* ---- the protocol ------------------------------------------------------------------------ */

static void learn_alert(struct criupy_tls_session *s, int alert)
{
	const char *what = NULL;

	switch (alert) {
	case SSL_AD_CERTIFICATE_REQUIRED:
		what = "it did not get a certificate of ours";
		break;
	case SSL_AD_UNKNOWN_CA:
		what = "our certificate is not signed by a CA that it trusts";
		break;
	case SSL_AD_CERTIFICATE_EXPIRED:
		what = "our certificate has expired, or is not valid yet";
		break;
	case SSL_AD_CERTIFICATE_REVOKED:
		what = "our certificate has been revoked";
		break;
	case SSL_AD_BAD_CERTIFICATE:
	case SSL_AD_UNSUPPORTED_CERTIFICATE:
	case SSL_AD_CERTIFICATE_UNKNOWN:
		what = "it does not accept our certificate; is it for the right name?";
		break;
	case SSL_AD_PROTOCOL_VERSION:
		say(s, CRIUPY_TLS_VERSION, "it says that it knows neither TLS 1.2 nor 1.3");
		return;
	default:
		break;
	}
	if (what)
		say(s, CRIUPY_TLS_ALERT, "it says that %s", what);
	else
		say(s, CRIUPY_TLS_ALERT, "it ended the TLS session: %s", SSL_alert_desc_string_long(alert));
}

void fault_learn(struct criupy_tls_session *s, int result)
{
	int kind = SSL_get_error(s->ssl, result);
	unsigned long error = ERR_peek_error();
	int reason = ERR_GET_LIB(error) == ERR_LIB_SSL ? ERR_GET_REASON(error) : 0;

	ERR_clear_error();
	if (s->fault)
		return;
	if (s->error) {
		say(s, CRIUPY_TLS_SOCKET, "%s", s->error == ECONNRESET ? "it reset the connection" : strerror(s->error));
	} else if (reason == SSL_R_UNEXPECTED_EOF_WHILE_READING || kind == SSL_ERROR_ZERO_RETURN ||
		   (kind == SSL_ERROR_SYSCALL && !error)) {
		say(s, CRIUPY_TLS_CLOSED, "it closed the connection");
	} else if (reason == SSL_R_WRONG_VERSION_NUMBER || reason == SSL_R_HTTP_REQUEST ||
		   reason == SSL_R_HTTPS_PROXY_REQUEST) {
		say(s, CRIUPY_TLS_PLAIN, "what it sent is no TLS: it was not told to use it (--tls)");
	} else if (reason == SSL_R_UNSUPPORTED_PROTOCOL || reason == SSL_R_VERSION_TOO_LOW) {
		say(s, CRIUPY_TLS_VERSION, "it knows neither TLS 1.2 nor 1.3");
	} else if (reason == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE) {
		say(s, CRIUPY_TLS_NO_CERTIFICATE, "it has shown no certificate");
	} else if (reason > SSL_AD_REASON_OFFSET) {
		learn_alert(s, reason - SSL_AD_REASON_OFFSET);
	} else {
		const char *words = ERR_reason_error_string(error);

		say(s, CRIUPY_TLS_OTHER, "TLS failed: %s", words ? words : "no reason is known");
	}
}

int criupy_tls_session_fault(const struct criupy_tls_session *session, char *text, size_t room)
{
	/* CRIU looks at certificates after the handshake, and ends politely. */
	if (!session->fault && session->ended && !session->heard)
		(void)snprintf(text, room, "it ended the TLS session right after the handshake, as CRIU does with a "
					   "certificate that it does not accept; its log says why");
	else
		(void)snprintf(text, room, "%s", session->text);
	return session->fault;
}

void criupy_tls_session_describe(const struct criupy_tls_session *session, char *text, size_t room)
{
	X509 *certificate = SSL_get0_peer_certificate(session->ssl);
	char subject[160];

	subject_of(certificate, subject, sizeof(subject));
	(void)snprintf(text, room, "%s, %s, %s%s", SSL_get_version(session->ssl), SSL_get_cipher_name(session->ssl),
		       subject, SSL_session_reused(session->ssl) ? ", resumed" : "");
}
