/* Which pages are asked for next.
 *
 * Demand goes out at once, whatever the window says. Background requests fill
 * what the window leaves, in address order from a cursor that each fault moves
 * to just behind itself: who touches pages in order is then always ahead of its
 * own faults, and who does not loses nothing by it. */

#include "pager.h"

/* From local images a copy is a system call, and faults are looked for between
 * two of them. */
#define LOCAL_RUN_PAGES 128

static void install_local(struct criupy_pager *p, struct criupy_image *image, uint64_t page,
			  uint64_t nr_pages, bool demand)
{
	const uint8_t *data = image_data(image, page, nr_pages);

	if (!data) {
		pager_fail(p, errno);
		return;
	}
	p->stats.pages_received += nr_pages;
	/* A busy task is served when the kernel is ready: the pages are still
	 * missing, and nothing is remembered of this try. */
	(void)install_run(p, image, page, nr_pages, data, demand);
}

static bool can_request(const struct criupy_pager *p)
{
	return p->stats.link == CRIUPY_LINK_OPEN && !p->close_sent && !p->given_up;
}

void fetch_demand(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr_pages)
{
	struct criupy_image *image = t->space->image;
	uint64_t end = page + nr_pages;

	if (p->given_up || p->stats.error)
		return;
	t->cursor = end;
	p->scan = t;
	while (page < end) {
		const struct extent *e = image_extent_of(image, page);
		uint64_t nr = min_u64(min_u64(end, e->first + e->nr_pages) - page, p->config.request_pages);

		if (image->map)
			install_local(p, image, page, nr, true);
		else if (can_request(p))
			link_request(p, image, page, nr, true);
		page += nr;
	}
}

/* The next run that nobody asked for, from the space that faulted last on. */
static struct task *next_run(struct criupy_pager *p, uint64_t *page, uint64_t *nr, uint64_t max)
{
	struct task *first = p->scan ? p->scan : p->tasks, *t = first;

	if (!t)
		return NULL;
	do {
		if (t->uffd >= 0 && !t->busy && t->space->nr_missing) {
			*page = t->cursor;
			*nr = criupy_space_next_missing(t->space, page, max, 0);
			if (!*nr && t->cursor) {
				*page = 0;
				*nr = criupy_space_next_missing(t->space, page, max, 0);
			}
			if (*nr) {
				t->cursor = *page + *nr;
				p->scan = t;
				return t;
			}
		}
		t = t->next ? t->next : p->tasks;
	} while (t != first);
	return NULL;
}

bool fetch_background(struct criupy_pager *p)
{
	uint64_t page, nr;
	struct task *t;

	if (p->stats.phase != CRIUPY_PHASE_RUNNING || p->given_up || p->stats.error)
		return false;
	if (!can_request(p)) {
		t = next_run(p, &page, &nr, LOCAL_RUN_PAGES);
		if (!t || !t->space->image->map)
			return false;
		install_local(p, t->space->image, page, nr, false);
		return true;
	}
	while (p->stats.nr_outstanding < p->stats.window_pages) {
		t = next_run(p, &page, &nr, p->config.request_pages);
		if (!t || link_request(p, t->space->image, page, nr, false))
			break;
	}
	return false;
}
