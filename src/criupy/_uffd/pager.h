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
/* Let go of the descriptor: what the source learns is as its socket is set, and
 * nothing while somebody else holds it. */
void link_leave(struct link *link);

/* ---- notices (notices.c): thread to Python ------------------------------------ */

#define NOTICE_RING 1024	/* a power of two */

struct notices {
	struct criupy_notice ring[NOTICE_RING];
	_Atomic uint32_t head;	/* written by the thread */
	_Atomic uint32_t tail;	/* written by the reader */
};

bool notices_push(struct notices *notices, struct criupy_notice notice);
bool notices_pop(struct notices *notices, struct criupy_notice *notice);

/* ---- the window (pager_window.c): how much is outstanding in the background ------ */

struct window {
	uint64_t pages;
	uint64_t request_pages;		/* the longest request */
	bool is_fixed;
	uint64_t rtt_ns;		/* the shortest that was seen, 0: none */
	uint64_t demand_ns;		/* when a fault last asked for a page */
	bool is_slow;			/* a short link of little bandwidth */
	uint64_t limit;			/* how much of the window may be outstanding by now */
	bool starting;			/* no queue was seen yet */
	bool probing;			/* the queue runs empty */
	bool was_full;			/* a request had to wait */
	uint32_t nr_empty;		/* rounds without a queue, in a row */
	uint64_t shrinks_from;		/* what it was when it began to, 0: it does not */
	uint64_t took_then_ns;
	bool probed;
	uint64_t probed_ns;		/* or when it began without */
	uint64_t empty_ns;		/* what the quickest reply of a round takes without a queue */
	uint64_t round_ns;		/* it begins */
	uint64_t settled_ns;		/* the first request of it was answered: those sent from now on count */
	uint32_t nr_counted;
	uint64_t quickest_ns;		/* what one of them took at least */
};

void window_init(struct window *w, uint32_t fixed_pages, uint32_t request_pages);
/* From now on there is another connection. */
void window_begin(struct window *w, uint64_t now_ns);
/* A fault asks for a page. */
void window_demand(struct window *w, uint64_t now_ns);
/* None did for a while. */
bool window_is_calm(const struct window *w, uint64_t now_ns);
/* How many pages the next request may have, 0: none now. */
uint64_t window_room(struct window *w, uint64_t now_ns, uint64_t outstanding, uint64_t nr_requests);
/* A reply to a request begins. */
void window_reply_begins(struct window *w, uint64_t now_ns, uint64_t sent_ns, bool bulk);
/* So many bytes of one in bulk were received. */
void window_received(struct window *w, uint64_t bytes);

/* ---- what is being waited for --------------------------------------------------- */

enum watched { WATCH_CONTROL, WATCH_RESTORE, WATCH_LANE, WATCH_TASK, WATCH_COPIERS };

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
	uint64_t cursors[NR_KINDS];	/* where the background scans of this space are */
	struct wait *waits;
	size_t nr_waits, room_waits;
	bool unserved;			/* a wait came while something else was done */
	uint64_t *zero_again;		/* addresses whose zero page met EAGAIN */
	size_t nr_zero_again, room_zero_again;
	bool cannot_take;		/* a page could not be copied to it last time */
	uint64_t retry_read_ns;		/* the descriptor could not be read: not before */
	bool attended;			/* it is in that list */
	struct task *next_attended;
	struct task *next;
	struct task *next_of_image;
};

/* ---- lanes: the connections to the source ----------------------------------------- */

/* A GET or a GETV that is not answered yet, or not whole. */
struct request {
	struct criupy_image *image;
	uint64_t nr_pages;		/* of all its runs */
	uint64_t nr_came;		/* the first so many of them */
	uint32_t nr_runs;		/* 1: a GET, and the answer may be shorter */
	uint64_t sent_ns;
	bool demand;
};

/* How much of a reply is installed at once: few enough pages to be in the
 * processor's cache still, and for a fault not to wait long behind them. */
#define PIECE_PAGES 64

/* One UFFDIO_COPY, or several in steps. */
struct copy {
	uint64_t page;
	uint64_t nr_pages;
	uint64_t addr;
	const uint8_t *data;
	uint64_t nr_done;
};

struct buffer {
	uint8_t *data;			/* PIECE_PAGES */
	/* The piece of a reply, or of a pages file, in it. */
	struct criupy_image *image;
	struct run *runs;		/* room for PIECE_PAGES */
	uint32_t nr_runs;
	uint64_t nr_pages;		/* of all of them */
	bool demand;
	bool local;			/* of pages files */
	bool unread;			/* and not here yet */
	struct buffer *next;
	/* While a copier has it. */
	struct task *task;
	int uffd;
	struct copy *copies;		/* room for PIECE_PAGES */
	uint32_t nr_copies;
	int error;			/* of reading it */
	atomic_bool cut;		/* stop after this step */
};

struct receiver {
	/* FAREWELL: CLOSE was answered, and a transport ends in an orderly way. */
	enum { RX_HEADER, RX_PAYLOAD, RX_STATUS, RX_FAREWELL } state;
	uint8_t header[CRIUPY_FRAME_32];
	size_t header_have;
	struct buffer *buffer;		/* the piece that is being received */
	uint64_t buffer_have;		/* bytes of it */
	uint64_t payload_left;		/* bytes of the reply that are not in it yet */
};

/* A queue in memory that only grows; room is a power of two, or 0. */
struct ring {
	void *items;
	size_t first, nr, room;
};

struct lane {
	enum watched watched;		/* first: epoll hands out a pointer to it */
	uint8_t requested;		/* its bit in image->requested */
	uint32_t state;			/* CRIUPY_LINK_*; what follows is meaningful while it is OPEN */
	int32_t error;			/* why it is LOST */
	uint32_t refused;		/* the reason in a REFUSED */
	struct link link;
	size_t frame_size;
	bool shared, extended;
	bool writable_wanted;
	bool close_sent;
	bool saying_goodbye;		/* the transport's close_notify has not gone yet */
	uint64_t farewell_ns;		/* since when, being lost, it is ended */
	uint8_t *out;			/* what the socket has not taken */
	size_t out_have, out_room;
	struct ring requests;
	struct ring runs;		/* of those requests, in their order */
	uint64_t nr_outstanding;	/* pages of those requests */
	struct receiver rx;
	uint64_t bytes_received;	/* over all its connections */
	uint64_t heard_ns;		/* last byte, or when waiting for one began */
};

struct command {
	enum {
		COMMAND_LINK, COMMAND_DROP_LINK, COMMAND_TASK, COMMAND_RESTORE, COMMAND_ABORT,
		COMMAND_GIVE_UP, COMMAND_POISON, COMMAND_PROBE, COMMAND_END, COMMAND_STOP,
	} kind;
	int fd;
	int value;
	int flags;
	int lane;
	int32_t pid;
	struct criupy_image *image;
	struct criupy_transport *transport;
	uint8_t preamble[CRIUPY_MAX_PREAMBLE];
	size_t preamble_length;
	struct command *next;
};

#define NR_LANES 2
/* Each lane needs a buffer to receive into, and pages of a file one to be read into. */
#define NR_SPARE (NR_LANES + 1)

struct criupy_pager {
	struct criupy_pager_config config;
	pthread_t thread;
	int epoll;
	int control;			/* eventfd, Python to thread */
	int event;			/* eventfd, thread to Python */
	enum watched watch_control, watch_restore;
	struct notices notices;

	pthread_mutex_t lock;		/* guards the two below */
	struct command *commands;
	struct criupy_stats published;

	bool stopping;
	bool retry_parked;		/* in a moment */
	bool dirty;			/* something happened since the last publication */
	uint64_t no_memory_ns;		/* when a page could last not be allocated */
	uint64_t no_memory_told_ns;
	bool held_back;			/* a fault waits for a reply that is just arriving */
	bool given_up;			/* ask for nothing more, end only when told to */
	struct criupy_stats stats;
	uint64_t published_ns;
	uint64_t now_ns;		/* read once per turn of the loop */
	struct criupy_image *images;
	struct task *tasks;
	/* With many tasks a turn must not look at all of them. */
	struct task *attended;		/* those to look at again though nothing was heard */
	size_t nr_waits;		/* of all of them */
	bool some_may_be_done;		/* some may miss nothing any more */
	bool some_are_released;
	bool some_are_local;		/* some have or had pages of pages files */
	struct task *scan;		/* the address space that background requests come from */

	int restore;			/* restore socket, -1 before and after */
	uint8_t restore_word[4];
	size_t restore_have;

	struct lane lanes[NR_LANES];
	struct window window;
	struct run runs[CRIUPY_MAX_RUNS];	/* of the request that is being made */
	struct copiers *copiers;	/* NULL: none */
	uint64_t poll_until_ns;

	uint8_t *staging;
	size_t staging_length;
	struct buffer *buffers;
	struct run *staging_runs;
	struct copy *staging_copies;
	struct buffer *free_buffers;
	uint32_t nr_free_buffers;
	struct buffer *parked, **parked_tail;
	struct buffer *deferred, **deferred_tail;
	bool deferred_is_waited_for;	/* a page of one is, maybe */
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

/* A thread waits for a page, or has just got it: something comes soon. */
void busy_poll(struct criupy_pager *p);

/* ---- pager_task.c ------------------------------------------------------------------ */

int task_add(struct criupy_pager *p, int32_t pid, int uffd, struct criupy_space *space, bool forked);
/* So many of its faults are not answered. */
void task_set_nr_waits(struct criupy_pager *p, struct task *t, size_t nr);
/* Whether any thread waits for one of these pages. */
bool is_waited_for(const struct criupy_image *image, uint64_t page, uint64_t nr_pages);
/* Look at it again in the next turn. */
void task_attend(struct criupy_pager *p, struct task *t);
/* There may be something to ask for. */
void task_serve_later(struct criupy_pager *p, struct task *t);
/* Read what the kernel has to say, once. */
void task_read(struct criupy_pager *p, struct task *t);
/* Look at those again that are to be. */
void tasks_attend(struct criupy_pager *p);
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
/* Put the piece in a buffer in place, or have a copier do it. The buffer is taken
 * care of; true if a copier has it. */
bool install_piece(struct criupy_pager *p, struct buffer *b);
/* Pages of an address space are there. */
void installed(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr, bool demand);
/* Try again what some task could not take. */
void install_parked(struct criupy_pager *p);
/* Put in place what was deferred and is waited for by now; something else if nothing is to be done otherwise. */
void install_deferred(struct criupy_pager *p, bool idle);
void install_all_deferred(struct criupy_pager *p);
void buffer_free(struct criupy_pager *p, struct buffer *b);
/* Keep a piece until it can be installed. */
void buffer_park(struct criupy_pager *p, struct buffer *b);
bool buffer_is_waited_for(const struct buffer *b);
/* Mark the pages in it as parked, or no longer. */
void buffer_mark(struct buffer *b);
void buffer_unmark(struct buffer *b);
/* Never fails: the piece that was parked first is given up for it if need be. */
struct buffer *buffer_take(struct criupy_pager *p);

/* ---- pager_copier.c: threads that copy beside the pager's -------------------------------- */

int copiers_start(struct criupy_pager *p, uint32_t nr);
void copiers_stop(struct criupy_pager *p);
/* Hand a piece over; false if it is not for them. */
bool copiers_take(struct criupy_pager *p, struct buffer *b);
/* Take back what is done. */
void copiers_collect(struct criupy_pager *p);
/* Have nothing more copied into an address space: before its descriptor is read, or closed. */
void copiers_settle(struct criupy_pager *p, struct task *t);
/* Whether nothing is done; if so they wake the pager when something is. */
bool copiers_may_sleep(struct criupy_pager *p);
void copiers_woke_us(struct criupy_pager *p);

/* ---- pager_fetch.c ------------------------------------------------------------------- */

/* Whether nothing that was asked for is going to bring this page soon enough
 * for a fault. */
bool fetch_is_due(struct criupy_pager *p, const struct criupy_image *image, uint64_t page);
/* Look again at faults on pages that were just arriving, once they no longer are. */
void fetch_held_back(struct criupy_pager *p);
/* Get a run that a fault waits for, now. */
void fetch_demand(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr_pages);
/* Fill the window, and if nothing came over a lane in this turn install one more run of
 * the local images; true if there is more to do at once. */
bool fetch_background(struct criupy_pager *p, bool came);
/* Install what pages files have of an address space, at once. */
void fetch_local_rest(struct criupy_pager *p, struct task *t);

/* A lane that was silent for so long is not just delivering a reply. */
#define STANDS_STILL_NS 5000000

/* ---- pager_lane.c: the life of a lane, and its way out -------------------------------- */

static inline struct lane *bulk_lane(struct criupy_pager *p)
{
	return &p->lanes[CRIUPY_LANE_BULK];
}

static inline struct lane *urgent_lane(struct criupy_pager *p)
{
	return &p->lanes[CRIUPY_LANE_URGENT];
}

void lanes_init(struct criupy_pager *p);
void lanes_free(struct criupy_pager *p);
void lane_open(struct criupy_pager *p, const struct command *command);
/* Add to what is to be sent. */
int lane_put(struct lane *l, const void *data, size_t length);
int lane_put_frame(struct lane *l, const struct criupy_frame *frame);
void lane_flush(struct criupy_pager *p, struct lane *l);
void lane_lost(struct criupy_pager *p, struct lane *l, int error);
void lane_drop(struct criupy_pager *p, struct lane *l);
/* The source goes on. */
void lanes_reset(struct criupy_pager *p);
/* A FIN, when nothing is waited for: an urgent lane has no more to say. */
void lane_close(struct criupy_pager *p, struct lane *l);
/* Nothing more is waited for: it is lost, or closed if CLOSE was answered. */
void lane_abandon(struct criupy_pager *p, struct lane *l, int error);
void lane_send_close(struct criupy_pager *p, struct lane *l);
/* Tell an extended source that the tasks may run. */
void lane_send_finished(struct criupy_pager *p, struct lane *l);
/* Nothing is outstanding, and no part of a frame is there. */
bool lane_is_idle(const struct lane *l);

/* ---- pager_request.c: what a lane was asked for ------------------------------------------ */

/* Queue one GET, or a GETV if there are several runs. */
int lane_request(struct criupy_pager *p, struct lane *l, struct criupy_image *image,
		 const struct run *runs, uint32_t nr_runs, bool demand);
/* The request that is answered next; there is one. */
struct request *lane_request_first(const struct lane *l);
/* A run of it. */
const struct run *lane_run(const struct lane *l, uint32_t i);
/* Its next pages have come: what they are goes into a buffer. */
void lane_request_came(struct criupy_pager *p, struct lane *l, uint64_t nr_pages, struct buffer *b);
/* Forget it: what has not come of it is missing again. */
void lane_request_pop(struct criupy_pager *p, struct lane *l);
/* Forget them all. */
void lane_requests_cancel(struct criupy_pager *p, struct lane *l);

/* ---- pager_reply.c ------------------------------------------------------------------------ */

/* Take in what is there, up to about a piece. */
void lane_read(struct criupy_pager *p, struct lane *l);
/* Install what has come of a piece that is not full. */
void lane_install(struct criupy_pager *p, struct lane *l);
/* If anybody waits for it. */
void lane_install_waited_for(struct criupy_pager *p, struct lane *l);

/* ---- pager_end.c ----------------------------------------------------------------------- */

void restore_read(struct criupy_pager *p);
void restore_abort(struct criupy_pager *p);
void poison_all(struct criupy_pager *p);
void probe_all(struct criupy_pager *p);
void end_link(struct criupy_pager *p, bool reset);
/* Notice that nothing is missing, or that the link has been closed. */
void check_done(struct criupy_pager *p);

#endif
