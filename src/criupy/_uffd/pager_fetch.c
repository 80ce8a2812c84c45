/* Which pages are asked for next.
 *
 * Demand goes out at once, whatever the window says. Background requests fill
 * what the window leaves, in address order from a cursor that each fault moves
 * to just behind itself: who touches pages in order is then always ahead of its
 * own faults, and who does not loses nothing by it.
 *
 * What the source has goes before what pages files have: it stands still for as long,
 * and has the only copy. The files are read when nothing comes from it. */

#include "pager.h"

/* True if a copier has it. */
static bool fetch_local(struct criupy_pager *p, struct criupy_image *image, const struct run *runs,
			uint32_t nr_runs, bool demand)
{
	struct buffer *b = buffer_take(p);

	b->image = image;
	b->demand = demand;
	b->local = b->unread = true;
	b->nr_runs = nr_runs;
	b->nr_pages = 0;
	for (uint32_t i = 0; i < nr_runs; i++) {
		b->runs[i] = runs[i];
		b->nr_pages += runs[i].nr_pages;
	}
	return install_piece(p, b);
}

static bool can_request(const struct criupy_pager *p, const struct lane *l)
{
	return l->state == CRIUPY_LINK_OPEN && !l->close_sent && !p->given_up;
}

static bool lane_stands_still(const struct criupy_pager *p, const struct lane *l)
{
	return p->now_ns - l->heard_ns >= STANDS_STILL_NS;
}

/* Whether the page is in the reply that a lane is just receiving. */
static bool is_arriving(const struct lane *l, const struct criupy_image *image, uint64_t page)
{
	const struct request *r;

	if (l->state != CRIUPY_LINK_OPEN || l->rx.state != RX_PAYLOAD)
		return false;
	r = lane_request_first(l);
	if (r->image != image)
		return false;
	/* What has come is not asked for, so all runs will do. */
	for (uint32_t i = 0; i < r->nr_runs; i++) {
		const struct run *run = lane_run(l, i);

		if (page - run->page < run->nr_pages)
			return true;
	}
	return false;
}

bool fetch_is_due(struct criupy_pager *p, const struct criupy_image *image, uint64_t page)
{
	if (image->requested[page] & REQUESTED_PARKED)
		p->deferred_is_waited_for = true;
	switch (image->requested[page]) {
	case 0:
		return true;
	case REQUESTED_BULK:
		if (!can_request(p, urgent_lane(p)))
			return false;
		if (is_arriving(bulk_lane(p), image, page) && !lane_stands_still(p, bulk_lane(p))) {
			p->held_back = true;
			return false;
		}
		return true;
	default:
		return false;
	}
}

void fetch_held_back(struct criupy_pager *p)
{
	if (!p->held_back || !lane_stands_still(p, bulk_lane(p)))
		return;
	p->held_back = false;
	for (struct task *t = p->tasks; t; t = t->next)
		task_serve_waits(p, t);
}

void fetch_demand(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr_pages)
{
	struct lane *l = can_request(p, urgent_lane(p)) ? urgent_lane(p) : bulk_lane(p);
	struct criupy_image *image = t->space->image;
	uint64_t end = page + nr_pages;

	if (p->given_up || p->stats.error)
		return;
	p->scan = t;
	while (page < end) {
		const struct extent *e = image_extent_of(image, page);
		int kind = image_kind(image, page);
		uint64_t most = kind == LOCAL ? PIECE_PAGES : p->config.request_pages;
		uint64_t nr = min_u64(min_u64(end, e->first + e->nr_pages) - page, most);

		t->cursors[kind] = page + nr;
		if (kind == LOCAL)
			fetch_local(p, image, &(struct run){ page, nr }, 1, true);
		else if (can_request(p, l))
			lane_request(p, l, image, &(struct run){ page, nr }, 1, true);
		page += nr;
	}
}

/* The next run of a kind that nobody asked for, from the space that faulted last on. */
static struct task *next_run(struct criupy_pager *p, int kind, uint64_t *page, uint64_t *nr, uint64_t max)
{
	struct task *first = p->scan ? p->scan : p->tasks, *t = first;

	if (!t)
		return NULL;
	do {
		if (t->uffd >= 0 && !t->cannot_take && space_nr_missing(t->space, kind)) {
			uint64_t begin = image_kind_begin(t->space->image, kind);
			uint64_t end = image_kind_end(t->space->image, kind);

			*page = max_u64(begin, t->cursors[kind]);
			*nr = space_next_missing(t->space, page, end, max, false);
			if (!*nr && t->cursors[kind] > begin) {
				*page = begin;
				*nr = space_next_missing(t->space, page, end, max, false);
			}
			if (*nr) {
				t->cursors[kind] = *page + *nr;
				p->scan = t;
				return t;
			}
		}
		t = t->next ? t->next : p->tasks;
	} while (t != first);
	return NULL;
}

/* As many runs of a kind as one request may have, from the space that faulted last on:
 * several only where there is GETV for them or they are in files, and of one image. */
static uint32_t next_runs(struct criupy_pager *p, int kind, bool several, uint64_t left,
			  struct criupy_image **image)
{
	struct run *runs = p->runs;
	struct task *t = next_run(p, kind, &runs->page, &runs->nr_pages, left);
	uint64_t *cursor, end;
	uint32_t nr = 1;

	if (!t)
		return 0;
	*image = t->space->image;
	if (!several || left > CRIUPY_MAX_RUN_PAGES)
		return 1;
	cursor = &t->cursors[kind];
	end = image_kind_end(*image, kind);
	for (left -= runs->nr_pages; left && nr < CRIUPY_MAX_RUNS; left -= runs[nr++].nr_pages) {
		runs[nr].page = *cursor;
		runs[nr].nr_pages = space_next_missing(t->space, &runs[nr].page, end, left, false);
		if (!runs[nr].nr_pages)
			break;
		*cursor = runs[nr].page + runs[nr].nr_pages;
	}
	return nr;
}

static void fetch_remote(struct criupy_pager *p, struct lane *bulk)
{
	struct criupy_image *image;
	uint32_t nr_runs;
	uint64_t nr;

	while ((nr = window_room(&p->window, p->now_ns, bulk->nr_outstanding, bulk->requests.nr))) {
		nr_runs = next_runs(p, REMOTE, bulk->extended, nr, &image);
		if (!nr_runs || lane_request(p, bulk, image, p->runs, nr_runs, false))
			break;
	}
}

bool fetch_background(struct criupy_pager *p, bool came)
{
	struct criupy_image *image;
	uint32_t nr_runs;

	if (p->stats.phase != CRIUPY_PHASE_RUNNING || p->given_up || p->stats.error)
		return false;
	if (can_request(p, bulk_lane(p)))
		fetch_remote(p, bulk_lane(p));
	if (!p->some_are_local || came)
		return p->some_are_local;
	/* A copy is a system call, and faults are looked for between two. */
	do {
		nr_runs = next_runs(p, LOCAL, true, PIECE_PAGES, &image);
		if (!nr_runs)
			return false;
	} while (fetch_local(p, image, p->runs, nr_runs, false));
	return true;
}

void fetch_local_rest(struct criupy_pager *p, struct task *t)
{
	struct criupy_image *image = t->space->image;
	struct run run;

	while (t->uffd >= 0 && !t->cannot_take && !p->stats.error) {
		run.page = image->first_local;
		run.nr_pages = space_next_missing(t->space, &run.page, image->nr_pages, PIECE_PAGES, false);
		if (!run.nr_pages)
			break;
		fetch_local(p, image, &run, 1, true);
	}
}
