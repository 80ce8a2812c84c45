/* The page server's own structures. */

#ifndef CRIUPY_SERVER_H
#define CRIUPY_SERVER_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <time.h>

#include "internal.h"
#include "upstream.h"

/* Requests that are read at once; they are small, and a batch is answered with few system calls. */
#define SERVER_IN (16 << 10)
/* Answers that are sent at once. */
#define SERVER_OUT (128 << 10)
/* From this length on an answer goes from the page cache to the socket; below, a copy and one call for many is cheaper. */
#define SERVER_SENDFILE_PAGES 16
/* The longest answer: what a stock server gives at most, so what every client has met. */
#define SERVER_ANSWER_PAGES 1024

/* Uploaded pages that are written at once. */
#define SERVER_HELD (256 << 10)
/* So much is written before the disk is told to begin with it. */
#define SERVER_WRITEBACK (8 << 20)
/* All uploads together have room for so many entries, every second page of
 * 128 GiB (half a gigabyte of memory here); an image has at most 4 PiB of pages. */
#define SERVER_ENTRIES (UINT64_C(1) << 24)
#define SERVER_IMAGE_PAGES (UINT64_C(1) << 40)

struct served_image {
	struct criupy_image *image;
	int fd;			/* its pages file, which was so when the image was added */
	off_t size;
	struct timespec written;
	/* Of an upstream, to which image and file belong: nothing is there before it was
	 * fetched. Where it evicts, pages are copied: the page cache may zero what lies
	 * inside a larger folio while a socket still refers to it. */
	struct criupy_upstream *upstream;
	uint64_t first;		/* its first page's number there */
	bool copied;
};

struct criupy_server {
	struct criupy_server_config config;
	int event_fd;
	/* Written before the first connection, only read by their threads. */
	struct served_image *images;	/* by id */
	size_t nr_images, room_images;
	struct criupy_upstream *upstream;	/* that has some of the images, or NULL */
	pthread_mutex_t lock;		/* of what follows, and of every connection's account */
	uint64_t nr_connections;
	struct connection *connections;
	_Atomic uint64_t nr_entries;	/* for which uploads have room */
};

/* The image that a dumper uploads. */
struct upload {
	uint64_t id;			/* dst_id, 0: none is open */
	int fd;				/* its pages file, or -1 */
	uint64_t end;			/* of the last entry */
	uint64_t pages;			/* of all entries */
	uint64_t written;		/* bytes of the file */
	uint64_t written_back;		/* of which the disk was told */
	uint64_t nr, room;
	uint64_t *starts;
	uint64_t *nr_pages;
	uint8_t *flags;
	size_t held;
	uint8_t hold[SERVER_HELD];	/* received, and not yet written */
};

enum asking { ASKS_NOTHING, ASKS, WAITS, IS_ANSWERED };

struct connection {
	struct criupy_server *server;
	struct connection *next;
	pthread_t thread;
	int fd;
	struct criupy_transport *transport;	/* NULL: plain TCP */
	/* Under the server's lock. */
	_Atomic bool cut;		/* read also without it, by who waits for an upstream */
	struct criupy_served account;
	enum asking asking;
	struct criupy_question question;
	int answer;
	int answer_fd;
	pthread_cond_t answered;	/* or cut */
	/* The rest belongs to the thread. */
	struct criupy_served counted;	/* copied to the account between batches */
	size_t frame_size;
	uint64_t timeout_ns;		/* how long a receive may take, 0: for ever */
	uint64_t partial_ns;		/* since when a frame is incomplete */
	const struct served_image *unchanged;	/* looked at since something was received */
	const struct served_image *in_out;	/* whose pages are in out, if any are */
	bool begun;			/* a frame came */
	bool claimed;			/* and a server that asks knows what comes of it */
	bool extended;			/* it began with HELLO */
	struct upstream_pin pin;	/* what an upstream holds for the answer that is being sent */
	bool closing;			/* CLOSE was answered */
	struct upload *upload;		/* NULL until something is opened */
	uint64_t offset;		/* in the stream, of the next frame */
	size_t in_start, in_end;
	size_t out_length;
	uint64_t out_pages;		/* of which out has answers */
	uint8_t in[SERVER_IN];
	uint8_t out[SERVER_OUT];
};

uint64_t server_now_ns(void);
/* Make the eventfd readable. */
void server_wake(const struct criupy_server *server);
const struct served_image *server_find(const struct criupy_server *server, uint64_t id);
int server_insert(struct criupy_server *server, const struct served_image *served);
/* Take out what belongs to an upstream. */
void server_forget(struct criupy_server *server, const struct criupy_upstream *upstream);
/* 0 while nobody has written to the pages file, -ESTALE, or -errno. */
int server_check_pages(const struct served_image *served);

/* ---- server_connection.c ------------------------------------------------------- */

/* Serve until the end; the account says how it was. */
void connection_serve(struct connection *c);
/* Each returns 0, or -1 with the reason in c->counted. */
int connection_fail(struct connection *c, uint32_t reason, int error);
/* Wait for Python's answer to a frame, which c->answer and c->answer_fd are then; with
 * ends, it ends the image that is open. body is that of a HELLO, or NULL. */
int connection_ask(struct connection *c, const struct criupy_frame *frame, const uint8_t *body, bool ends);
/* Let the account show what was counted so far. */
void connection_publish(struct connection *c);
/* Send what is in c->out and what a transport holds; with more, it may wait for
 * what follows. */
int connection_flush(struct connection *c, bool more);
/* Count pages that have gone. */
void connection_sent(struct connection *c, uint64_t nr_pages);

/* ---- server_stream.c ------------------------------------------------------------ */

/* The only functions that touch the connection's bytes. Each returns -1 with the
 * reason in c->counted when it fails; a receive that is out of time is STALLED. */
/* Bytes, 0 at the peer's end. */
ssize_t stream_receive(struct connection *c, void *into, size_t room);
int stream_send(struct connection *c, const void *data, size_t length, bool more);
/* Send what a transport holds back for more. */
int stream_flush(struct connection *c);
/* From the page cache; through c->out, which must be empty, where there is a transport. */
int stream_send_file(struct connection *c, const struct served_image *served, uint64_t start, size_t length);
/* Answer a peer that announced its end, let a transport say what it has to, and
 * release it. */
void stream_end(struct connection *c);

/* ---- server_answer.c --------------------------------------------------------------------- */

int answer_get(struct connection *c, const struct criupy_frame *frame);
/* The runs behind a GETV, as they came. */
int answer_getv(struct connection *c, const struct criupy_frame *frame, const uint8_t *runs);
int read_pages(struct connection *c, int fd, uint64_t offset, uint8_t *into, size_t length);
/* Nobody has written to the pages of an image. */
int check_unchanged(struct connection *c, const struct served_image *served);

/* ---- server_session.c ------------------------------------------------------------------------ */

/* Each returns 0, or -1 with the reason in c->counted. */
/* Tell a client of ours why there is no more, and fail. */
int session_refuse(struct connection *c, uint32_t reason);
/* An answer could not begin: where the source is gone, tell a client of ours. */
int session_gone(struct connection *c);
int session_hello(struct connection *c, const struct criupy_frame *frame, const uint8_t *body);
/* The first frame of a stock client, and the first that asks for pages of one of ours. */
int session_claim(struct connection *c, const struct criupy_frame *frame);
int session_finished(struct connection *c, const struct criupy_frame *frame);
/* CLOSE and ABORT where pages are given out; status receives the answer. */
int session_end(struct connection *c, const struct criupy_frame *frame, int32_t *status);
/* ---- server_upstream.c ------------------------------------------------------------------------ */

/* Whether these pages are here or may come. */
int check_pages(struct connection *c, const struct served_image *served, uint64_t page, uint64_t nr);
/* Wait until pages of an image, from this one on, can be read, at most *nr, and how
 * many receives *nr. 0, or -1 with the reason in c->counted. */
int hold_pages(struct connection *c, const struct served_image *served, uint64_t page, uint64_t *nr);
/* They have gone, or been copied, if result is 0; returns it. */
int release_pages(struct connection *c, const struct served_image *served, int result);

/* ---- server_receive.c ----------------------------------------------------------------------- */

/* Each returns 0, or -1 with the reason in c->counted. */
int receive_open(struct connection *c, const struct criupy_frame *frame);
int receive_parent(struct connection *c, const struct criupy_frame *frame);
int receive_add(struct connection *c, const struct criupy_frame *frame);
/* status receives what CLOSE is answered with. */
int receive_close(struct connection *c, const struct criupy_frame *frame, int32_t *status);
void upload_free(struct criupy_server *server, struct upload *upload);

#endif
