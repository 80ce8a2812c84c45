/* Which pages of the source are here, which is asked for next, and which go when
 * there is no more room.
 *
 * A page has a byte. It is absent, asked for, kept, and kept but given to somebody:
 * such a page can go, the oldest first. It may be wanted again (a destination asks
 * anew after its connection was lost), but nothing is read ahead twice. Should all
 * that is kept be wanted still, and somebody waits for something else, then the
 * page goes that came first.
 *
 * Both orders are rings of runs, written when pages come and when they are given
 * away. What is in a ring may be out of date; the byte decides. */

#include "upstream.h"

/* ---- numbers ------------------------------------------------------------------------ */

const struct upstream_image *upstream_locate(const struct criupy_upstream *u, uint64_t page,
					     const struct extent **extent, uint64_t *number)
{
	size_t low = 0, high = u->nr_images;

	/* The last that begins no later; an image without pages begins with the next. */
	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;

		if (u->images[middle].first <= page)
			low = middle;
		else
			high = middle;
	}
	*number = page - u->images[low].first;
	*extent = image_extent_of(u->images[low].image, *number);
	return &u->images[low];
}

uint64_t upstream_offset(const struct extent *extent, uint64_t number)
{
	return (extent->data + number - extent->first) << PAGE_SHIFT;
}

/* How many pages from one on lie in its extent. */
static uint64_t rest_of_extent(const struct criupy_upstream *u, uint64_t page)
{
	const struct extent *extent;
	uint64_t number;

	upstream_locate(u, page, &extent, &number);
	return extent->first + extent->nr_pages - number;
}

/* The pages from one on, at most nr, that have a state. */
static uint64_t run_of(const struct criupy_upstream *u, uint64_t page, uint64_t nr, uint8_t state)
{
	uint64_t n = 0;

	while (n < nr && u->state[page + n] == state)
		n++;
	return n;
}

/* ---- states -------------------------------------------------------------------------- */

int upstream_grow(struct criupy_upstream *u, uint64_t nr_pages)
{
	uint64_t had = u->stats.pages_total, has = had + nr_pages;
	uint64_t had_groups = (had + UPSTREAM_GROUP - 1) / UPSTREAM_GROUP;
	uint64_t has_groups = (has + UPSTREAM_GROUP - 1) / UPSTREAM_GROUP;
	uint16_t *nr_absent;
	uint8_t *state;

	state = realloc(u->state, has + 1);
	if (!state)
		return -ENOMEM;
	u->state = state;
	nr_absent = realloc(u->nr_absent, (has_groups + 1) * sizeof(*nr_absent));
	if (!nr_absent)
		return -ENOMEM;
	u->nr_absent = nr_absent;
	memset(state + had, UPSTREAM_ABSENT, nr_pages);
	state[has] = UPSTREAM_KEPT;	/* where a search ends */
	memset(nr_absent + had_groups, 0, (has_groups - had_groups) * sizeof(*nr_absent));
	for (uint64_t page = had; page < has; page = (page / UPSTREAM_GROUP + 1) * UPSTREAM_GROUP)
		nr_absent[page / UPSTREAM_GROUP] +=
			(uint16_t)(min_u64(has, (page / UPSTREAM_GROUP + 1) * UPSTREAM_GROUP) - page);
	u->stats.pages_total = has;
	return 0;
}

bool upstream_is_here(const struct criupy_upstream *u, uint64_t page)
{
	return u->state[page] == UPSTREAM_KEPT || u->state[page] == UPSTREAM_SERVED;
}

void upstream_set(struct criupy_upstream *u, struct upstream_run run, uint8_t state)
{
	for (uint64_t page = run.page; page < run.page + run.nr; page++) {
		u->nr_absent[page / UPSTREAM_GROUP] -= u->state[page] == UPSTREAM_ABSENT;
		u->stats.nr_outstanding -= u->state[page] == UPSTREAM_ASKED;
		u->stats.pages_kept -= upstream_is_here(u, page);
		u->state[page] = state;
		u->nr_absent[page / UPSTREAM_GROUP] += state == UPSTREAM_ABSENT;
		u->stats.nr_outstanding += state == UPSTREAM_ASKED;
		u->stats.pages_kept += upstream_is_here(u, page);
	}
}

/* The first absent page at or after one, before end; end if none. */
static uint64_t next_absent(const struct criupy_upstream *u, uint64_t page, uint64_t end)
{
	while (page < end) {
		uint64_t stop = min_u64((page / UPSTREAM_GROUP + 1) * UPSTREAM_GROUP, end);

		if (u->nr_absent[page / UPSTREAM_GROUP]) {
			const uint8_t *found = memchr(u->state + page, UPSTREAM_ABSENT, stop - page);

			if (found)
				return (uint64_t)(found - u->state);
		}
		page = stop;
	}
	return end;
}

/* ---- rings ---------------------------------------------------------------------------- */

int upstream_make_rings(struct criupy_upstream *u)
{
	uint64_t room = min_u64(u->config.cache_pages, u->stats.pages_total);

	/* Each served page is in one entry; what came may be in an old one, too. */
	u->served.room = room + 1;
	u->kept.room = 2 * room + 1;
	u->served.items = malloc(u->served.room * sizeof(*u->served.items));
	u->kept.items = malloc(u->kept.room * sizeof(*u->kept.items));
	return u->served.items && u->kept.items ? 0 : -ENOMEM;
}

static void ring_push(struct upstream_ring *ring, struct upstream_run run)
{
	ring->items[(ring->first + ring->nr++) % ring->room] = run.page << 16 | run.nr;
}

static struct upstream_run ring_pop(struct upstream_ring *ring)
{
	uint64_t item = ring->items[ring->first];

	ring->first = (ring->first + 1) % ring->room;
	ring->nr--;
	return (struct upstream_run){ item >> 16, item & 0xffff };
}

/* The ring is full of what is out of date: begin anew with what is kept, whose order is lost. */
static void renew_kept(struct criupy_upstream *u)
{
	uint64_t page = 0, end = u->stats.pages_total;
	const uint8_t *found;

	u->kept.first = u->kept.nr = 0;
	while (page < end && (found = memchr(u->state + page, UPSTREAM_KEPT, end - page))) {
		struct upstream_run run = { .page = (uint64_t)(found - u->state) };

		run.nr = run_of(u, run.page, min_u64(rest_of_extent(u, run.page), UPSTREAM_PAGES), UPSTREAM_KEPT);
		ring_push(&u->kept, run);
		page = run.page + run.nr;
	}
}

void upstream_put(struct criupy_upstream *u, struct upstream_run run)
{
	upstream_set(u, run, UPSTREAM_KEPT);
	if (!u->config.cache_pages)
		return;
	if (u->kept.nr == u->kept.room)
		renew_kept(u);
	else
		ring_push(&u->kept, run);
}

void upstream_give(struct criupy_upstream *u, struct upstream_run run)
{
	uint64_t page = run.page, end = run.page + run.nr;

	while (page < end) {
		uint64_t nr = run_of(u, page, end - page, UPSTREAM_KEPT);

		if (nr) {
			const struct upstream_run given = { page, nr };

			upstream_set(u, given, UPSTREAM_SERVED);
			u->stats.pages_given += nr;
			if (u->config.cache_pages)
				ring_push(&u->served, given);
		}
		page += nr ? nr : 1;
	}
}

/* ---- room ------------------------------------------------------------------------------ */

static uint64_t room(const struct criupy_upstream *u)
{
	uint64_t used = u->stats.pages_kept + u->stats.nr_outstanding;

	if (!u->config.cache_pages)
		return UINT64_MAX;
	return u->config.cache_pages > used ? u->config.cache_pages - used : 0;
}

/* Somebody has it, or is about to. */
static bool in_use(const struct criupy_upstream *u, struct upstream_run run)
{
	for (const struct upstream_pin *p = u->pins; p; p = p->next)
		if (p->run.page < run.page + run.nr && run.page < p->run.page + p->run.nr)
			return true;
	for (const struct upstream_waiter *w = u->waiters; w; w = w->next)
		if (run.page <= w->run.page && w->run.page < run.page + run.nr)
			return true;
	return false;
}

static void evict_run(struct criupy_upstream *u, struct upstream_run run, uint8_t becomes)
{
	const struct extent *extent;
	const struct upstream_image *image;
	uint64_t number;
	int result;

	image = upstream_locate(u, run.page, &extent, &number);
	result = criupy_punch_hole(image->fd, upstream_offset(extent, number), run.nr << PAGE_SHIFT);
	if (result < 0)
		upstream_disk_failed(u, -result);
	upstream_set(u, run, becomes);
	u->stats.pages_evicted += run.nr;
}

/* Take what is oldest in a ring, until there is room for so many or nothing is left but
 * what is in use. */
static void evict(struct criupy_upstream *u, struct upstream_ring *ring, uint8_t state, uint8_t becomes,
		  uint64_t wanted)
{
	for (size_t left = ring->nr; left && room(u) < wanted; left--) {
		struct upstream_run run = ring_pop(ring);

		if (in_use(u, run)) {
			ring_push(ring, run);
			continue;
		}
		while (run.nr) {
			uint64_t nr = run_of(u, run.page, run.nr, state);

			if (nr)
				evict_run(u, (struct upstream_run){ run.page, nr }, becomes);
			run.page += nr ? nr : 1;
			run.nr -= nr ? nr : 1;
		}
	}
}

/* At most nr pages for which there is room. */
static uint64_t make_room(struct criupy_upstream *u, uint64_t nr, bool demand)
{
	if (room(u) < nr)
		evict(u, &u->served, UPSTREAM_SERVED, UPSTREAM_EVICTED, nr);
	if (room(u) < nr && demand)
		evict(u, &u->kept, UPSTREAM_KEPT, UPSTREAM_ABSENT, nr);
	nr = min_u64(nr, room(u));
	u->starved = !nr;
	return nr;
}

/* ---- what is asked for ------------------------------------------------------------------ */

static bool is_wanting(const struct criupy_upstream *u, uint64_t page)
{
	return u->state[page] == UPSTREAM_ABSENT || u->state[page] == UPSTREAM_EVICTED;
}

/* In a small cache a request must leave room for others. */
static uint64_t longest(const struct criupy_upstream *u, uint64_t nr)
{
	return u->config.cache_pages ? max_u64(min_u64(nr, u->config.cache_pages / 8), 1) : nr;
}

/* Who waits for little goes before who waits for much, and that in the order they came. */
static const struct upstream_waiter *next_waiter(const struct criupy_upstream *u)
{
	const struct upstream_waiter *found = NULL;

	for (const struct upstream_waiter *w = u->waiters; w; w = w->next) {
		if (!is_wanting(u, w->run.page))
			continue;
		if (w->run.nr <= UPSTREAM_URGENT_PAGES)
			return w;
		if (!found)
			found = w;
	}
	return found;
}

bool upstream_next(struct criupy_upstream *u, struct upstream_run *run, bool *urgent)
{
	const struct upstream_waiter *w = next_waiter(u);
	bool busy = u->stats.nr_outstanding > (u->careful ? 0 : UPSTREAM_OUTSTANDING_PAGES);
	uint64_t most;

	*urgent = w != NULL;
	if (w) {
		most = min_u64(w->run.nr, longest(u, UPSTREAM_PAGES));
		run->page = w->run.page;
		if (busy && most > UPSTREAM_URGENT_PAGES)
			return false;
	} else {
		if (busy)
			return false;
		run->page = next_absent(u, u->cursor, u->stats.pages_total);
		if (run->page == u->stats.pages_total)
			run->page = next_absent(u, 0, u->cursor);
		if (u->state[run->page] != UPSTREAM_ABSENT)
			return false;
		most = min_u64(rest_of_extent(u, run->page), longest(u, UPSTREAM_AHEAD_PAGES));
	}
	for (run->nr = 1; run->nr < most; run->nr++)
		if (w ? !is_wanting(u, run->page + run->nr) : u->state[run->page + run->nr] != UPSTREAM_ABSENT)
			break;
	run->nr = make_room(u, run->nr, w != NULL);
	if (!run->nr || u->stats.disk_error)
		return false;
	if (!w)
		u->careful -= u->careful > 0;
	else if (w->run.nr <= UPSTREAM_URGENT_PAGES)
		u->careful = UPSTREAM_CAREFUL_REQUESTS;
	u->cursor = run->page + run->nr;
	return true;
}
