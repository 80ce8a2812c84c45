/* The pager's own structures. Unless said otherwise they belong to its thread. */

#ifndef CRIUPY_PAGER_H
#define CRIUPY_PAGER_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "internal.h"

/* ---- the link (link.c): a byte stream to the source -------------------------- */

/* The functions behave as readv(2) and write(2) on a non-blocking socket: bytes,
 * 0 at the peer's end (receive only), or -errno, -EAGAIN meaning "not now". */
struct link {
	int fd;
	struct criupy_transport *transport;	/* NULL: plain TCP */
	ssize_t (*receive)(struct link *link, const struct iovec *into, int nr);
	ssize_t (*send)(struct link *link, const void *data, size_t length);
};

void link_init(struct link *link, int fd, struct criupy_transport *transport);
/* Send what a transport still holds: 0 when all of it has gone. */
int link_push(struct link *link);
/* Whether there is something to receive that epoll does not know of. */
bool link_pending(const struct link *link);
/* End the connection so that the source goes on: an RST. */
void link_reset(struct link *link);
/* End it after CLOSE was answered: a FIN. */
void link_close(struct link *link);

/* ---- notices (notices.c): thread to Python ------------------------------------ */

#define NOTICE_RING 1024	/* a power of two */

struct notices {
	struct criupy_notice ring[NOTICE_RING];
	_Atomic uint32_t head;	/* written by the thread */
	_Atomic uint32_t tail;	/* written by the reader */
};

bool notices_push(struct notices *notices, struct criupy_notice notice);
bool notices_pop(struct notices *notices, struct criupy_notice *notice);

/* ---- what is being waited for --------------------------------------------------- */

enum watched { WATCH_CONTROL, WATCH_RESTORE, WATCH_LINK, WATCH_TASK };

/* A fault that was read and is not answered yet. */
struct wait {
	uint64_t page;
	uint64_t read_ns;
};

/* One address space of the restore: a restored task or a child forked since. */
struct task {
	enum watched watched;		/* first: epoll hands out a pointer to it */
	int uffd;			/* -1 once let go */
	int32_t pid;			/* dump-time pid of the restored task it came from */
	bool forked;
	bool poisoned;
	struct criupy_space *space;
	uint64_t cursor;		/* where the background scan of this space is */
	struct wait *waits;
	size_t nr_waits, room_waits;
	bool unserved;			/* a wait came while something else was done */
	uint64_t *zero_again;		/* addresses whose zero page met EAGAIN */
	size_t nr_zero_again, room_zero_again;
	bool busy;			/* the kernel could not take a page last time */
	uint64_t retry_read_ns;		/* the descriptor could not be read: not before */
	struct task *next;
};

/* A GET that is not answered yet. */
struct request {
	struct criupy_image *image;
	uint64_t page;
	uint64_t nr_pages;
	uint64_t sent_ns;
	bool demand;
	bool alone;			/* nothing was outstanding when it was sent */
};

struct buffer {
	uint8_t *data;
	/* The reply in it, while parked. */
	struct criupy_image *image;
	uint64_t page;
	uint64_t nr_pages;
	bool demand;
	struct buffer *next;
};

struct receiver {
	/* FAREWELL: CLOSE was answered, and a transport ends in an orderly way. */
	enum { RX_HEADER, RX_PAYLOAD, RX_STATUS, RX_FAREWELL } state;
	uint8_t header[CRIUPY_FRAME_32];
	size_t header_have;
	struct buffer *buffer;
	uint64_t payload_have, payload_length;
};

struct command {
	enum {
		COMMAND_LINK, COMMAND_DROP_LINK, COMMAND_TASK, COMMAND_RESTORE, COMMAND_ABORT,
		COMMAND_GIVE_UP, COMMAND_POISON, COMMAND_PROBE, COMMAND_END, COMMAND_STOP,
	} kind;
	int fd;
	int value;
	int shared;
	int32_t pid;
	struct criupy_image *image;
	struct criupy_transport *transport;
	struct command *next;
};

struct criupy_pager {
	struct criupy_pager_config config;
	pthread_t thread;
	int epoll;
	int control;			/* eventfd, Python to thread */
	int event;			/* eventfd, thread to Python */
	enum watched watch_control, watch_restore, watch_link;
	struct notices notices;

	pthread_mutex_t lock;		/* guards the two below */
	struct command *commands;
	struct criupy_stats published;

	bool stopping;
	bool busy;			/* some task is: try again in a moment */
	bool dirty;			/* something happened since the last publication */
	uint64_t no_memory_ns;		/* when a page could last not be allocated */
	uint64_t no_memory_told_ns;
	bool given_up;			/* ask for nothing more, end only when told to */
	struct criupy_stats stats;
	uint64_t published_ns;
	uint64_t now_ns;		/* read once per turn of the loop */
	struct criupy_image *images;
	struct task *tasks;
	struct task *scan;		/* the address space that background requests come from */

	int restore;			/* restore socket, -1 before and after */
	uint8_t restore_word[4];
	size_t restore_have;

	struct link link;		/* meaningful while stats.link is OPEN */
	size_t frame_size;
	bool link_shared;
	bool link_writable_wanted;
	bool close_sent;
	bool saying_goodbye;		/* the transport's close_notify has not gone yet */
	uint64_t farewell_ns;		/* since when a lost link is being ended */
	uint8_t *out;			/* encoded frames the socket has not taken */
	size_t out_have, out_room;
	struct request *requests;	/* ring of room_requests, a power of two */
	size_t first_request, nr_requests, room_requests;
	struct receiver rx;
	uint64_t link_heard_ns;		/* last byte, or when waiting for one began */
	uint64_t busy_since_ns, busy_bytes;
	double bytes_per_ns;

	uint8_t *staging;
	size_t staging_length;
	struct buffer *buffers;
	struct buffer *free_buffers;
	struct buffer *parked, **parked_tail;
	uint32_t final_outcome;		/* what ENDED will say once CLOSING is over */
};

uint64_t monotonic_ns(void);
void signal_eventfd(int fd);
/* The thread. */
void *pager_run(void *pager);
/* Before every close: criu may hold a duplicate, and then epoll would go on
 * handing out a pointer to what is freed. */
void unwatch(struct criupy_pager *p, int fd);
void pager_notice(struct criupy_pager *p, uint32_t kind, int error, uint64_t a, uint64_t b);
/* Tell Python that the phase or the link changed. */
void pager_publish(struct criupy_pager *p);
void pager_set_phase(struct criupy_pager *p, uint32_t phase);
/* The pager itself cannot go on; Python decides what becomes of the tasks. */
void pager_fail(struct criupy_pager *p, int error);

/* ---- pager_task.c ------------------------------------------------------------------ */

int task_add(struct criupy_pager *p, int32_t pid, int uffd, struct criupy_space *space, bool forked);
/* Read what the kernel has to say, once. */
void task_read(struct criupy_pager *p, struct task *t);
/* Try a descriptor again that could not be read for want of resources. */
void task_read_again(struct criupy_pager *p, struct task *t);
/* Read until nothing is left; true if an event changed the lazy space. */
bool task_drain(struct criupy_pager *p, struct task *t);
/* The kernel had no page for a task: tell of it now and then, and slow down. */
void no_memory(struct criupy_pager *p, const struct task *t, uint64_t addr);
/* Answer what is waiting: zero pages again, requests for what is not asked for. */
void task_serve_waits(struct criupy_pager *p, struct task *t);
/* Let go of the descriptor, and of the structure at the end of the turn. */
void task_release(struct criupy_pager *p, struct task *t);
void task_gone(struct criupy_pager *p, struct task *t);
void tasks_sweep(struct criupy_pager *p);

/* ---- pager_install.c ---------------------------------------------------------------- */

/* Copy a run to every address space that misses it. 0, or -EAGAIN when one of
 * them could not take it yet: try the same again later. */
int install_run(struct criupy_pager *p, struct criupy_image *image, uint64_t page,
		uint64_t nr_pages, const uint8_t *data, bool demand);
/* Try again what a busy task could not take. */
void install_parked(struct criupy_pager *p);
void buffer_free(struct criupy_pager *p, struct buffer *b);
void buffer_park(struct criupy_pager *p, struct buffer *b);
/* Never fails: the oldest parked reply is given up for it if need be. */
struct buffer *buffer_take(struct criupy_pager *p);

/* ---- pager_fetch.c ------------------------------------------------------------------- */

/* Get a run that a fault waits for, now. */
void fetch_demand(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr_pages);
/* Fill the window, or install one more run of the local images; true if there
 * is more to do at once. */
bool fetch_background(struct criupy_pager *p);

/* ---- pager_link.c --------------------------------------------------------------------- */

void link_open(struct criupy_pager *p, int fd, int frame_size, bool shared,
	       struct criupy_transport *transport);
/* Queue one GET. */
int link_request(struct criupy_pager *p, struct criupy_image *image, uint64_t page,
		 uint64_t nr_pages, bool demand);
void link_flush(struct criupy_pager *p);
/* Take in what is there, up to about one long reply. */
void link_read(struct criupy_pager *p);
void link_lost(struct criupy_pager *p, int error);
void link_drop(struct criupy_pager *p);
/* Nothing more is waited for: it is lost, or closed if CLOSE was answered. */
void link_abandon(struct criupy_pager *p, int error);
void link_send_close(struct criupy_pager *p);

/* ---- pager_end.c ----------------------------------------------------------------------- */

void restore_read(struct criupy_pager *p);
void restore_abort(struct criupy_pager *p);
void poison_all(struct criupy_pager *p);
void probe_all(struct criupy_pager *p);
void end_link(struct criupy_pager *p, bool reset);
/* Notice that nothing is missing, or that the link has been closed. */
void check_done(struct criupy_pager *p);

#endif
