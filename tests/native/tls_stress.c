/* Many sessions at once with tickets in common: threads that connect, resume and
 * break off, each both ends of its own connections, with one context a side.
 *
 * tls_stress DIRECTORY COUNT: certificates, and how many connections each thread makes. */

#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#include "session.h"

#define THREADS 4

static struct criupy_tls_context *contexts[2];
static unsigned nr_connections;
static _Atomic unsigned nr_resumed;

/* It does not see how OpenSSL, which is not compiled for it, counts references. */
const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
	return "called_from_lib:libcrypto.so\ncalled_from_lib:libssl.so\n";
}

static void expect(bool is, const char *what)
{
	if (!is) {
		fprintf(stderr, "not %s\n", what);
		abort();
	}
}

static struct criupy_tls_context *make(const char *directory, const char *name, bool server)
{
	struct criupy_tls_context *context;
	char path[4096];

	expect(!criupy_tls_context_create(&context, server), "a context");
	(void)snprintf(path, sizeof(path), "%s/cacert.pem", directory);
	expect(!criupy_tls_context_trust(context, path), "an authority");
	(void)snprintf(path, sizeof(path), "%s/%s.pem", directory, name);
	expect(!criupy_tls_context_certificate(context, path), "a certificate");
	(void)snprintf(path, sizeof(path), "%s/%s-key.pem", directory, name);
	expect(!criupy_tls_context_key(context, path), "its key");
	return context;
}

static bool is_resumed(struct criupy_tls_session *session)
{
	char text[512];

	criupy_tls_session_describe(session, text, sizeof(text));
	return strstr(text, ", resumed") != NULL;
}

static void connect_once(void)
{
	struct criupy_tls_session *sessions[2];
	struct criupy_transport *transports[2];
	int fds[2], events, results[2] = {-EAGAIN, -EAGAIN};
	char byte = '!';
	int64_t got;

	expect(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), "sockets");
	for (int i = 0; i < 2; i++) {
		expect(!criupy_tls_session_create(&sessions[i], contexts[i], fds[i], "127.0.0.1"), "a session");
		transports[i] = criupy_tls_session_transport(sessions[i]);
	}
	while (results[0] == -EAGAIN || results[1] == -EAGAIN)
		for (int i = 0; i < 2; i++)
			if (results[i] == -EAGAIN)
				results[i] = criupy_tls_session_handshake(sessions[i], &events);
	expect(!results[0] && !results[1], "a handshake");
	expect(is_resumed(sessions[0]) == is_resumed(sessions[1]), "the same on both sides");
	nr_resumed += is_resumed(sessions[0]);
	expect(transports[1]->send(transports[1], &byte, 1) == 1, "sent");
	expect(!transports[1]->flush(transports[1]), "flushed");
	do
		got = transports[0]->receive(transports[0], &byte, 1);
	while (got == -EAGAIN);
	expect(got == 1, "received");
	for (int i = 0; i < 2; i++) {
		criupy_tls_session_destroy(sessions[i]);
		close(fds[i]);
	}
}

static void *work(void *argument)
{
	(void)argument;
	for (unsigned i = 0; i < nr_connections; i++)
		connect_once();
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_t threads[THREADS];

	expect(argc == 3, "two arguments");
	nr_connections = (unsigned)atoi(argv[2]);
	contexts[0] = make(argv[1], "client", false);
	contexts[1] = make(argv[1], "server", true);
	for (int i = 0; i < THREADS; i++)
		expect(!pthread_create(&threads[i], NULL, work, NULL), "a thread");
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < 2; i++)
		criupy_tls_context_destroy(contexts[i]);
	expect(nr_resumed > THREADS * nr_connections / 2, "resumed");
	printf("%u of %u\n", nr_resumed, THREADS * nr_connections);
	return 0;
}
