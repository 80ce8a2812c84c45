/* The page server's own structures. */

#ifndef CRIUPY_SERVER_H
#define CRIUPY_SERVER_H

#include <pthread.h>
#include <sys/types.h>

#include "internal.h"

/* Requests that are read at once; they are small, and a batch is answered with few system calls. */
#define SERVER_IN (16 << 10)
/* Answers that are sent at once. */
#define SERVER_OUT (128 << 10)
/* From this length on an answer goes from the page cache to the socket; below, a copy and one call for many is cheaper. */
#define SERVER_SENDFILE_PAGES 16
/* The longest answer: what a stock server gives at most, so what every client has met. */
#define SERVER_ANSWER_PAGES 1024

struct served_image {
	struct criupy_image *image;
	int fd;			/* its pages file */
};

struct criupy_server {
	struct criupy_server_config config;
	int event_fd;
	/* Written before the first connection, only read by their threads. */
	struct served_image *images;	/* by id */
	size_t nr_images, room_images;
	pthread_mutex_t lock;		/* of what follows, and of every connection's account */
	uint64_t nr_connections;
	struct connection *connections;
};

struct connection {
	struct criupy_server *server;
	struct connection *next;
	pthread_t thread;
	int fd;
	struct criupy_transport *transport;	/* NULL: plain TCP; otherwise fd is non-blocking */
	bool cut;			/* under the server's lock */
	struct criupy_served account;	/* under the server's lock */
	/* The rest belongs to the thread. */
	struct criupy_served counted;	/* copied to the account between batches */
	size_t frame_size;
	uint64_t timeout_ns;		/* what the socket's receive timeout is set to */
	uint64_t partial_ns;		/* since when a frame is incomplete */
	bool closing;			/* CLOSE was answered */
	uint64_t offset;		/* in the stream, of the next frame */
	size_t in_start, in_end;
	size_t out_length;
	uint8_t in[SERVER_IN];
	uint8_t out[SERVER_OUT];
};

uint64_t server_now_ns(void);
const struct served_image *server_find(const struct criupy_server *server, uint64_t id);

/* ---- server_connection.c ------------------------------------------------------- */

/* Serve until the end; the account says how it was. */
void connection_serve(struct connection *c);
/* Each returns 0, or -1 with the reason in c->counted. */
int connection_fail(struct connection *c, uint32_t reason, int error);
/* Send what is in c->out and what a transport holds; with more, it may wait for
 * what follows. */
int connection_flush(struct connection *c, bool more);

/* ---- server_stream.c ------------------------------------------------------------ */

/* The only functions that touch the connection's bytes. Each returns -1 with the
 * reason in c->counted when it fails; a receive that is out of time is STALLED. */
int stream_init(struct connection *c);
/* How long a receive may take, 0: for ever. */
int stream_set_timeout(struct connection *c, uint64_t ns);
/* Bytes, 0 at the peer's end. */
ssize_t stream_receive(struct connection *c, void *into, size_t room);
int stream_send(struct connection *c, const void *data, size_t length, bool more);
/* Send what a transport holds back for more. */
int stream_flush(struct connection *c);
/* From the page cache; through c->out, which must be empty, where there is a transport. */
int stream_send_file(struct connection *c, int fd, uint64_t start, size_t length);
/* Answer a peer that announced its end, let a transport say what it has to, and
 * release it. */
void stream_end(struct connection *c);

/* ---- server_answer.c --------------------------------------------------------------------- */

int answer_get(struct connection *c, const struct criupy_frame *frame);
int read_pages(struct connection *c, int fd, uint64_t offset, uint8_t *into, size_t length);

#endif
