/* How much is outstanding in the background.
 *
 * It decides two things against each other: too little and the link idles for a
 * round trip after each reply, too much and a demand page queues behind all of
 * it. On a lane of its own it queues only where both lanes share the link; on the
 * same lane, behind everything. Either way it is behind what lies there because
 * more is outstanding than the link carries in a round trip. How much that is
 * shows in how long replies take beyond what they take without a queue: the
 * least excess in a round is a queue that stands all the time. The window is made
 * what the link carried meanwhile in a round trip and a little queue (the
 * slack), which is what keeps the link busy. It need not be known what the link
 * carries: with w outstanding, replies take w / bandwidth, so
 *
 *   w = w * (round trip + slack) / (what the quickest reply took)
 *
 * At first, until a queue is seen, it doubles. A window is judged by replies to what
 * was asked for when the first thing asked for under it had come: what queue it
 * makes is there by then.
 *
 * What replies take without a queue is the quickest of a round, too, and not the
 * quickest ever: where machines are busy that was luck, and against it every
 * round would look as if there were a queue. And it must be found out again,
 * since it may have been measured over a queue, and paths change: now and then half
 * a round trip's worth is outstanding for a round, which lets the queue run empty.
 * And where the window shrinks and replies take no less, the queue is not ours.
 *
 * On one machine or in one rack what a reply takes is mostly who has the processor,
 * and no queue can be told from that. There the window is what a source delivers
 * at full speed with, and a multiple of it, in long requests, which cost less, while
 * nobody waits. */

#include "pager.h"

#define MAX_WINDOW_PAGES (64u << 8)	/* 64 MiB */
#define SLACK_SHIFT 3			/* an eighth of the round trip, */
#define LEAST_SLACK_NS 300000		/* but what a thread's turn may take is no queue, */
#define FIRST_PAGES 320			/* until a round trip was seen */
#define SHORT_NS 500000			/* round trips in one rack */
#define SHORT_PAGES 128
#define SHORT_CALM_PAGES 256
#define SHORT_REQUESTS 6		/* a stock source takes 50 us for each, however small */
#define SHORT_MOST_NS 700000		/* they take less, or the link is a slow one */
#define CALM_NS 20000000
#define REQUEST_SHIFT 4			/* a request is a sixteenth of the window, since a fault */
#define LEAST_REQUEST_PAGES 8		/* may queue behind one, but no less than arrives in a turn */
#define MOST_SHRINK 0.8		/* by one round: it may have been a hiccup */
#define ROUND_REPLIES 12		/* by which a window is judged: few would all be late where it is busy */
#define EMPTY_ROUNDS 3			/* without a queue: it grows faster */
#define EMPTY_GROWTH 1.25
#define PROBE_SOON_NS UINT64_C(1000000000)
#define PROBE_NS UINT64_C(5000000000)

static void begin_round(struct window *w, uint64_t now_ns)
{
	w->round_ns = now_ns;
	/* A probe asks for nothing before the queue has run empty. */
	w->settled_ns = w->probing ? now_ns : 0;
	w->nr_counted = 0;
	w->quickest_ns = UINT64_MAX;
	w->was_full = false;
}

void window_begin(struct window *w, uint64_t now_ns)
{
	w->is_slow = false;
	w->starting = true;
	w->probing = false;
	w->probed = false;
	w->probed_ns = now_ns;
	w->empty_ns = w->rtt_ns; /* until a probe says better */
	w->nr_empty = 0;
	w->shrinks_from = 0;
	w->limit = w->pages;
	begin_round(w, now_ns);
}

void window_init(struct window *w, uint32_t fixed_pages, uint32_t request_pages)
{
	w->is_fixed = fixed_pages;
	w->request_pages = request_pages;
	w->pages = fixed_pages ? fixed_pages : FIRST_PAGES;
}

static bool is_short(const struct window *w)
{
	return w->rtt_ns < SHORT_NS && !w->is_slow;
}

static uint64_t slack(const struct window *w)
{
	return max_u64(w->empty_ns >> SLACK_SHIFT, LEAST_SLACK_NS);
}

void window_demand(struct window *w, uint64_t now_ns)
{
	w->demand_ns = now_ns;
}

bool window_is_calm(const struct window *w, uint64_t now_ns)
{
	return now_ns - w->demand_ns > CALM_NS;
}

static uint64_t short_room(struct window *w, uint64_t now_ns, uint64_t outstanding, uint64_t nr_requests)
{
	uint64_t pages = window_is_calm(w, now_ns) ? SHORT_CALM_PAGES : SHORT_PAGES;

	w->pages = w->limit = w->rtt_ns ? pages : FIRST_PAGES;
	/* The next one is on its way while one is answered. */
	if (nr_requests >= SHORT_REQUESTS || outstanding > w->pages / 2)
		return 0;
	return min_u64(w->pages / 2, w->request_pages);
}

uint64_t window_room(struct window *w, uint64_t now_ns, uint64_t outstanding, uint64_t nr_requests)
{
	uint64_t pages;

	if (w->is_fixed)
		return outstanding < w->pages ? w->request_pages : 0;
	if (is_short(w))
		return short_room(w, now_ns, outstanding, nr_requests);
	if (outstanding >= w->limit) {
		w->was_full = w->limit == w->pages;
		return 0;
	}
	pages = max_u64(w->pages >> REQUEST_SHIFT, w->pages * LEAST_SLACK_NS / (w->empty_ns + slack(w)));
	return min_u64(max_u64(pages, LEAST_REQUEST_PAGES), w->request_pages);
}

/* Whether it shrinks by a third and more, and replies take as long as before. */
static bool shrinks_in_vain(struct window *w)
{
	if (w->quickest_ns <= w->empty_ns + slack(w)) {
		w->shrinks_from = 0;
		return false;
	}
	if (!w->shrinks_from || w->quickest_ns > w->took_then_ns) {
		w->shrinks_from = w->pages;
		w->took_then_ns = w->quickest_ns;
	}
	return 3 * w->pages <= 2 * w->shrinks_from && (double)w->quickest_ns > 0.85 * (double)w->took_then_ns;
}

static void adjust(struct window *w)
{
	double by;

	if (shrinks_in_vain(w)) {
		w->empty_ns = w->quickest_ns;
		w->shrinks_from = 0;
	}
	by = (double)(w->empty_ns + slack(w)) / (double)w->quickest_ns;
	w->nr_empty = w->quickest_ns < w->empty_ns + slack(w) / 2 ? w->nr_empty + 1 : 0;
	w->starting = w->starting && by >= 1;
	if (w->starting)
		by = 2;
	else if (w->nr_empty >= EMPTY_ROUNDS)
		by = EMPTY_GROWTH;
	if (by > 1 && !w->was_full)
		return; /* what was outstanding tells nothing of more */
	by = by < MOST_SHRINK ? MOST_SHRINK : by;
	w->pages = (uint64_t)((double)w->pages * by);
	w->pages = min_u64(max_u64(w->pages, 2 * LEAST_REQUEST_PAGES), MAX_WINDOW_PAGES);
	w->limit = min_u64(w->limit, w->pages);
}

static void end_round(struct window *w, uint64_t now_ns)
{
	bool was_starting = w->starting;
	uint64_t half;

	if (is_short(w)) {
		w->is_slow = w->quickest_ns > SHORT_MOST_NS;
		w->starting = false;
	} else if (w->probing) {
		w->starting = w->quickest_ns > w->empty_ns + slack(w);
		w->empty_ns = w->quickest_ns;
		w->probing = false;
		w->probed = true;
		w->probed_ns = now_ns;
	} else {
		if (w->starting && w->quickest_ns < w->empty_ns)
			w->empty_ns = w->quickest_ns;
		else if (w->quickest_ns < w->empty_ns)
			w->empty_ns -= (w->empty_ns - w->quickest_ns) / 4;
		adjust(w);
		/* What was learnt while it doubled may have been learnt over a queue. */
		w->probing = now_ns - w->probed_ns > PROBE_NS ||
			     (was_starting && !w->starting &&
			      (!w->probed || now_ns - w->probed_ns > PROBE_SOON_NS));
		/* Half of what the link carried in a round trip. */
		half = (uint64_t)((double)w->pages * (double)w->empty_ns / (double)w->quickest_ns / 2);
		if (w->probing)
			w->limit = max_u64(half, LEAST_REQUEST_PAGES);
	}
	begin_round(w, now_ns);
}

void window_reply_begins(struct window *w, uint64_t now_ns, uint64_t sent_ns, bool bulk)
{
	uint64_t took = max_u64(now_ns - sent_ns, 1);	/* it is divided by */

	w->rtt_ns = w->rtt_ns ? min_u64(w->rtt_ns, took) : took;
	if (!w->empty_ns)
		w->empty_ns = w->rtt_ns;
	if (!bulk)
		return;
	if (w->is_fixed || sent_ns < w->round_ns)
		return;
	if (!w->settled_ns)
		w->settled_ns = now_ns;
	if (sent_ns < w->settled_ns)
		return;
	w->quickest_ns = min_u64(w->quickest_ns, took);
	if (++w->nr_counted == ROUND_REPLIES)
		end_round(w, now_ns);
}

void window_received(struct window *w, uint64_t bytes)
{
	/* What the window has more than before is not asked for at once: it would
	 * come as one burst. */
	if (w->limit < w->pages && !w->probing)
		w->limit = min_u64(w->pages, w->limit + (bytes >> (PAGE_SHIFT + 1)));
}
