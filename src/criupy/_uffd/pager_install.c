/* Putting pages in place.
 *
 * A run of pages is copied to each address space that still misses them. The
 * kernel decides what a run is: the images tell where VMAs began and ended when
 * the task was dumped, but its own mprotect, munmap or mremap moves borders, the
 * first of these without any event. So every copy may come back with "not all",
 * "not now", "there already" or "not one mapping", and each of these is an
 * ordinary answer:
 *
 *   EAGAIN   an event waits: read it, judge again; still EAGAIN: park the piece
 *   EEXIST   the page is there: wake who waits for it, go on behind it
 *   ENOENT   a border inside the run: halve it. At a single page: before
 *            restore-finished the area is not registered yet, leave the page
 *            missing; afterwards, with all events read, it is no longer mapped
 *   ESRCH    the address space is gone
 *
 * COPY holds the target's VMA lock for the whole call, so runs are cut to
 * MAX_COPY: its own munmap should not wait longer than that. */

#include <sched.h>

#include "pager.h"

#define MAX_COPY_PAGES 128

/* An event that was read still blocks copies until the thread that raised it
 * has run; usually that is within microseconds. */
#define AGAIN_TRIES 3

/* A task that raises events without pause must not keep the others waiting. */
#define MAX_DRAINS 16

static void answered(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr)
{
	uint64_t now = 0;
	size_t kept = 0;

	for (size_t i = 0; i < t->nr_waits; i++) {
		uint64_t ns;

		if (t->waits[i].page - page >= nr) {
			t->waits[kept++] = t->waits[i];
			continue;
		}
		if (!now)
			now = monotonic_ns();
		ns = now - t->waits[i].read_ns;
		histogram_add(p->stats.latency, ns);
		p->stats.latency_sum_ns += ns;
		p->stats.latency_max_ns = max_u64(p->stats.latency_max_ns, ns);
	}
	task_set_nr_waits(p, t, kept);
	if (now)
		busy_poll(p);
}

void installed(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr, bool demand)
{
	criupy_space_set(t->space, page, nr, CRIUPY_PAGE_PRESENT);
	p->some_may_be_done |= !t->space->nr_missing;
	if (demand)
		p->stats.pages_demand += nr;
	else
		p->stats.pages_background += nr;
	answered(p, t, page, nr);
}

static int install_into(struct criupy_pager *p, struct task *t, uint64_t page, uint64_t nr_pages,
			const uint8_t *data, bool demand)
{
	/* What is waited for comes first, and wakes who waits. */
	uint64_t end = page + nr_pages, done = page, limit = demand ? 1 : MAX_COPY_PAGES;
	int again = 0, drains = 0;

	while (done < end && t->uffd >= 0) {
		const uint8_t *state = t->space->state;
		uint64_t addr, nr, progress;
		int ret;

		if (state[done] != CRIUPY_PAGE_MISSING) {
			done++;
			continue;
		}
		for (nr = 1; nr < limit && done + nr < end; nr++)
			if (state[done + nr] != CRIUPY_PAGE_MISSING)
				break;
		if (criupy_space_locate(t->space, done, &addr, &nr)) {
			/* mremap over it, without an unmap event before. */
			criupy_space_set(t->space, done, 1, CRIUPY_PAGE_REMOVED);
			p->stats.pages_dropped++;
			continue;
		}
		ret = criupy_uffd_copy(t->uffd, addr, data + ((done - page) << PAGE_SHIFT),
				       nr << PAGE_SHIFT, &progress);
		if (progress) {
			installed(p, t, done, progress >> PAGE_SHIFT, demand);
			done += progress >> PAGE_SHIFT;
			limit = min_u64(2 * limit, MAX_COPY_PAGES);
			again = 0;
			continue;
		}
		switch (ret) {
		case -EAGAIN:
			p->stats.nr_again++;
			if (task_drain(p, t) ? ++drains > MAX_DRAINS : ++again > AGAIN_TRIES)
				return -EAGAIN;
			if (again)
				sched_yield();
			break;
		case -EEXIST:
			(void)criupy_uffd_wake(t->uffd, addr, CRIUPY_PAGE_SIZE);
			criupy_space_set(t->space, done, 1, CRIUPY_PAGE_PRESENT);
			p->stats.pages_existing++;
			answered(p, t, done, 1);
			done++;
			break;
		case -ENOENT:
			if (nr > 1) {
				limit = nr / 2;
				break;
			}
			/* Its neighbours are probably like it: limit grows again
			 * with the first that is not. */
			if (p->stats.phase == CRIUPY_PHASE_RESTORING) {
				done++;
				break;
			}
			if (task_drain(p, t)) {
				if (++drains > MAX_DRAINS)
					return -EAGAIN;
				break;
			}
			(void)criupy_uffd_wake(t->uffd, addr, CRIUPY_PAGE_SIZE);
			criupy_space_set(t->space, done, 1, CRIUPY_PAGE_REMOVED);
			p->stats.pages_dropped++;
			answered(p, t, done, 1);
			done++;
			break;
		case -ESRCH:
		case -ENOSPC:
			task_gone(p, t);
			return 0;
		case -ENOMEM:
			no_memory(p, t, addr);
			return -EAGAIN;
		default:
			pager_fail(p, -ret);
			return 0;
		}
	}
	return 0;
}

int install_run(struct criupy_pager *p, struct criupy_image *image, uint64_t page,
		uint64_t nr_pages, const uint8_t *data, bool demand)
{
	int ret = 0;

	for (struct task *t = image->tasks; t; t = t->next_of_image) {
		if (t->uffd < 0 || t->poisoned)
			continue;
		if (install_into(p, t, page, nr_pages, data, demand)) {
			t->cannot_take = true;
			task_attend(p, t);
			p->retry_parked = true;
			ret = -EAGAIN;
		}
		p->some_may_be_done |= !t->space->nr_missing;
	}
	return ret;
}

/* 0 or -EAGAIN, as install_run. */
static int install_runs(struct criupy_pager *p, const struct buffer *b)
{
	const uint8_t *data = b->data;
	int ret = 0;

	for (uint32_t i = 0; i < b->nr_runs; i++) {
		const struct run *run = &b->runs[i];

		/* What one run cannot have yet, the others need not wait for. */
		if (install_run(p, b->image, run->page, run->nr_pages, data, b->demand))
			ret = -EAGAIN;
		data += run->nr_pages << PAGE_SHIFT;
	}
	return ret;
}

static void install_now(struct criupy_pager *p, struct buffer *b)
{
	if (b->unread) {
		int ret = image_read(b->image, b->runs, b->nr_runs, b->data);

		if (ret) {
			pager_fail(p, -ret);
			buffer_free(p, b);
			return;
		}
		b->unread = false;
		p->stats.pages_received += b->nr_pages;
		p->stats.local_received += b->nr_pages;
	}
	if (install_runs(p, b))
		buffer_park(p, b);
	else
		buffer_free(p, b);
}

/* ---- pieces that wait until there is time ------------------------------------------ */

/* To copy what nobody waits for takes longer than to receive what somebody does, if
 * that comes behind it on the same lane. On two the source has a core for each, if
 * there are cores, and to receive bulk faster would only take them away. */
static bool may_be_deferred(struct criupy_pager *p, const struct buffer *b)
{
	if (urgent_lane(p)->state == CRIUPY_LINK_OPEN)
		return false;
	return p->nr_waits && !b->demand && !b->unread && p->nr_free_buffers >= NR_SPARE && !buffer_is_waited_for(b);
}

static void defer(struct criupy_pager *p, struct buffer *b)
{
	buffer_mark(b);
	b->next = NULL;
	*p->deferred_tail = b;
	p->deferred_tail = &b->next;
}

bool install_piece(struct criupy_pager *p, struct buffer *b)
{
	if (copiers_take(p, b))
		return true;
	if (may_be_deferred(p, b))
		defer(p, b);
	else
		install_now(p, b);
	return false;
}

/* The link is what points at it. */
static void install_one_deferred(struct criupy_pager *p, struct buffer **link)
{
	struct buffer *b = *link;

	*link = b->next;
	if (!b->next)
		p->deferred_tail = link;
	buffer_unmark(b);
	install_now(p, b);
}

void install_deferred(struct criupy_pager *p, bool idle)
{
	struct buffer **link = &p->deferred;

	if (p->deferred_is_waited_for) {
		p->deferred_is_waited_for = false;
		while (*link)
			if (buffer_is_waited_for(*link))
				install_one_deferred(p, link);
			else
				link = &(*link)->next;
	} else if (p->deferred && (idle || !p->nr_waits)) {
		install_one_deferred(p, link);
	}
}

void install_all_deferred(struct criupy_pager *p)
{
	while (p->deferred)
		install_one_deferred(p, &p->deferred);
}

/* ---- staging buffers, and pieces that wait in them ----------------------------- */

void buffer_free(struct criupy_pager *p, struct buffer *b)
{
	b->next = p->free_buffers;
	p->free_buffers = b;
	p->nr_free_buffers++;
}

bool buffer_is_waited_for(const struct buffer *b)
{
	for (uint32_t i = 0; i < b->nr_runs; i++)
		if (is_waited_for(b->image, b->runs[i].page, b->runs[i].nr_pages))
			return true;
	return false;
}

void buffer_mark(struct buffer *b)
{
	for (uint32_t i = 0; i < b->nr_runs; i++)
		image_mark(b->image, b->runs[i].page, b->runs[i].nr_pages, REQUESTED_PARKED);
}

void buffer_unmark(struct buffer *b)
{
	for (uint32_t i = 0; i < b->nr_runs; i++)
		image_unmark(b->image, b->runs[i].page, b->runs[i].nr_pages, REQUESTED_PARKED);
}

void buffer_park(struct criupy_pager *p, struct buffer *b)
{
	buffer_mark(b);
	b->next = NULL;
	*p->parked_tail = b;
	p->parked_tail = &b->next;
}

static struct buffer *unpark_first(struct criupy_pager *p)
{
	struct buffer *b = p->parked;

	p->parked = b->next;
	if (!p->parked)
		p->parked_tail = &p->parked;
	buffer_unmark(b);
	return b;
}

struct buffer *buffer_take(struct criupy_pager *p)
{
	struct buffer *b = p->free_buffers;

	if (b) {
		p->free_buffers = b->next;
		p->nr_free_buffers--;
		return b;
	}
	/* As many as are spare are in use at most, so some are parked. Nothing is lost: the
	 * pages are still missing and are asked for again. */
	b = unpark_first(p);
	for (struct task *t = b->image->tasks; t; t = t->next_of_image)
		task_serve_later(p, t);
	return b;
}

void install_parked(struct criupy_pager *p)
{
	struct buffer *b = p->parked;

	p->retry_parked = false;
	p->parked = NULL;
	p->parked_tail = &p->parked;
	for (struct task *t = p->attended; t; t = t->next_attended)
		t->cannot_take = false;
	while (b) {
		struct buffer *next = b->next;

		buffer_unmark(b);
		install_now(p, b);
		b = next;
	}
	/* What could not be taken from local images was not asked for otherwise. */
	for (struct task *t = p->attended; t; t = t->next_attended)
		t->unserved = true;
}
