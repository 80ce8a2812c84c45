/* The fetcher's own structures, and what the page server's threads call. */

#ifndef CRIUPY_UPSTREAM_H
#define CRIUPY_UPSTREAM_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "internal.h"
#include "pager.h"	/* struct link */

/* The longest request, and how long one is that waits for no other. */
#define UPSTREAM_PAGES 256
#define UPSTREAM_URGENT_PAGES 16
/* One request of read-ahead, and how much may be outstanding when one is made: an
 * urgent request waits for all of it. Enough that the source never waits for us, and
 * nothing for so many requests after somebody has waited: threads that run touch one
 * missing page after the other. */
#define UPSTREAM_AHEAD_PAGES 32
#define UPSTREAM_OUTSTANDING_PAGES 64
#define UPSTREAM_CAREFUL_REQUESTS 64
#define UPSTREAM_REQUESTS 32

/* Pages are numbered through all images; runs lie inside one extent. */
struct upstream_run {
	uint64_t page;
	uint64_t nr;
};

/* The oldest is at first. */
struct upstream_ring {
	uint64_t *items;	/* page << 16 | nr */
	size_t room, first, nr;
};

struct upstream_image {
	struct criupy_image *image;
	int fd;
	uint64_t first;		/* the number of its first page */
};

/* A connection that has pages in use; in the list of its upstream. */
struct upstream_pin {
	struct upstream_run run;
	struct upstream_pin *next, **link;
};

/* A connection that waits. */
struct upstream_waiter {
	struct upstream_run run;
	pthread_cond_t changed;
	struct upstream_waiter *next, **link;
};

/* Of a page. */
enum {
	UPSTREAM_ABSENT,
	UPSTREAM_ASKED,
	UPSTREAM_KEPT,
	UPSTREAM_SERVED,	/* kept, and given to somebody */
	UPSTREAM_EVICTED,	/* given to somebody, and kept no more */
};

enum upstream_receiver { UPSTREAM_HEADER, UPSTREAM_PAYLOAD, UPSTREAM_STATUS };

struct criupy_upstream {
	struct criupy_upstream_config config;
	int event_fd;			/* to Python */
	int command_fd;			/* to the thread */
	_Atomic int nr_owners;
	pthread_t thread;
	bool started;
	struct upstream_image *images;	/* not changed once started */
	size_t nr_images, room_images;
	pthread_mutex_t lock;		/* of what follows */
	struct criupy_upstream_stats stats;
	bool stopping, resetting, closing, leaving;
	bool starved;			/* there was no room for what is wanted */
	uint8_t *state;			/* of each page */
	uint16_t *nr_absent;		/* of each group of UPSTREAM_GROUP pages */
	uint64_t cursor;		/* read-ahead goes on here */
	unsigned int careful;		/* requests of read-ahead that go alone */
	struct upstream_ring kept, served;	/* only where something is evicted */
	struct upstream_pin *pins;
	struct upstream_waiter *waiters, **waiters_end;
	/* The rest belongs to the thread. */
	struct link link;
	size_t frame_size;
	bool close_sent;
	uint64_t heard_ns;		/* last byte, or when waiting for one began */
	struct upstream_run requests[UPSTREAM_REQUESTS];	/* a ring */
	size_t first_request, nr_requests;
	uint8_t out[(UPSTREAM_REQUESTS + 1) * CRIUPY_FRAME_32];	/* not sent yet: at most what is not answered, and CLOSE */
	size_t out_have;
	enum upstream_receiver receiver;
	uint8_t header[CRIUPY_FRAME_32];
	size_t header_have;
	uint64_t payload_length, payload_have;
	uint8_t *payload;		/* UPSTREAM_PAGES of them */
};

/* ---- upstream_cache.c: which pages are here, all under the lock -------------------- */

#define UPSTREAM_GROUP 4096

/* Where a page is: its image, its extent, its number in the image. */
const struct upstream_image *upstream_locate(const struct criupy_upstream *u, uint64_t page,
					     const struct extent **extent, uint64_t *number);
/* Where its bytes are in the image's file. */
uint64_t upstream_offset(const struct extent *extent, uint64_t number);
int upstream_grow(struct criupy_upstream *u, uint64_t nr_pages);
int upstream_make_rings(struct criupy_upstream *u);
void upstream_set(struct criupy_upstream *u, struct upstream_run run, uint8_t state);
bool upstream_is_here(const struct criupy_upstream *u, uint64_t page);
/* What came, and what of it was given to somebody. */
void upstream_put(struct criupy_upstream *u, struct upstream_run run);
void upstream_give(struct criupy_upstream *u, struct upstream_run run);
/* What to ask for next; false for nothing now. */
bool upstream_next(struct criupy_upstream *u, struct upstream_run *run, bool *urgent);

/* ---- upstream_link.c ------------------------------------------------------------------ */

void *upstream_thread(void *upstream);

/* ---- upstream.c ------------------------------------------------------------------------- */

/* Make an eventfd readable. */
void upstream_wake_fd(int fd);
/* Under the lock: wake who waits for any of these pages. */
void upstream_tell(struct criupy_upstream *u, struct upstream_run run);
/* Nothing more can be kept; who waits for what is not here is told. */
void upstream_disk_failed(struct criupy_upstream *u, int error);
/* One more holder of the images and what is kept of them. */
void upstream_share(struct criupy_upstream *u);
void upstream_unshare(struct criupy_upstream *u);

/* Why some of these pages will never be given out: -EPIPE where they are not here and
 * the source is lost, -ESHUTDOWN where it was told to go on; 0 when all may be. */
int upstream_check(struct criupy_upstream *u, uint64_t page, uint64_t nr);
/* Wait until page is there. got receives how many from it on are, at most nr, which
 * must lie inside an extent; they stay until they are released. -ECANCELED when
 * *cut became true, -EPIPE when the source is lost or ended and does not have it,
 * -ESHUTDOWN when it was told to go on, also for what is here, -errno when it cannot be
 * kept. Without cut -EAGAIN instead of waiting. */
int upstream_hold(struct criupy_upstream *u, uint64_t page, uint64_t nr, const _Atomic bool *cut,
		  struct upstream_pin *pin, uint64_t *got);
/* served: somebody has them, so they can be evicted. */
void upstream_release(struct criupy_upstream *u, struct upstream_pin *pin, bool served);
/* Whoever waits looks whether it was cut. */
void upstream_wake(struct criupy_upstream *u);

#endif
