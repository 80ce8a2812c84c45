/* Copiers: threads that put pieces in place beside the pager's own.
 *
 * What UFFDIO_COPY costs is the allocation and the charging of each page, and a
 * second core halves that. The pager hands over whole pieces of bulk, all
 * resolved to addresses, and goes on with receiving and with faults; what a thread
 * waits for it installs itself, since to wake somebody takes longer than to copy
 * a page. A copier knows nothing but descriptors and addresses: all state stays the
 * pager's, which takes the piece back when it is done and then marks what is
 * there. Until then the pages are marked as parked.
 *
 * An address is good only until the next event of that address space has been
 * read: the thread that raised it goes on then, and may map something else there.
 * So nothing is copied into an address space while its descriptor is read, and what
 * a copier has of it then is not copied there any more. To be done with it soon a
 * copier copies in steps, and looks before each; for one that still reads a piece
 * out of a pages file, which may take as long as a disk does, nobody waits. */

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "pager.h"

#define STEP_PAGES 32
#define LEAST_PAGES 16	/* fewer are copied sooner than a thread is woken */

struct copier {
	struct criupy_pager *pager;
	pthread_t thread;
	struct buffer *piece;		/* under the lock, as is the next */
	bool copying;			/* it */
};

struct copiers {
	pthread_mutex_t lock;		/* guards what follows, and each copier's piece */
	pthread_cond_t work;		/* something is queued */
	pthread_cond_t idle;		/* a piece is done */
	bool stopping;
	bool asleep;			/* the pager is, and event wakes it */
	struct buffer *queued, **queued_tail;
	struct buffer *done;
	/* What follows is the pager's. */
	enum watched watched;
	int event;
	uint32_t nr_handed;		/* pieces that are not taken back yet */
	uint32_t nr;
	struct copier copiers[];
};

/* ---- a copier ------------------------------------------------------------------- */

static int copy_step(const struct buffer *b, struct copy *c)
{
	uint64_t progress, nr = min_u64(c->nr_pages - c->nr_done, STEP_PAGES);
	int ret = criupy_uffd_copy(b->uffd, c->addr + (c->nr_done << PAGE_SHIFT),
				   c->data + (c->nr_done << PAGE_SHIFT), nr << PAGE_SHIFT, &progress);

	c->nr_done += progress >> PAGE_SHIFT;
	return progress ? 0 : ret;
}

static void read_piece(struct buffer *b)
{
	if (!b->unread)
		return;
	b->error = image_read(b->image, b->runs, b->nr_runs, b->data);
	b->unread = b->error;
}

static void copy_piece(struct buffer *b)
{
	for (uint32_t i = 0; i < b->nr_copies; i++)
		while (b->copies[i].nr_done < b->copies[i].nr_pages)
			if (atomic_load(&b->cut) || copy_step(b, &b->copies[i]))
				return; /* the pager sees why when it does the rest */
}

static void *copier_run(void *arg)
{
	struct copier *me = arg;
	struct copiers *c = me->pager->copiers;

	pthread_setname_np(pthread_self(), "criupy-copier");
	pthread_mutex_lock(&c->lock);
	while (!c->stopping) {
		if (!c->queued) {
			pthread_cond_wait(&c->work, &c->lock);
			continue;
		}
		me->piece = c->queued;
		c->queued = me->piece->next;
		if (!c->queued)
			c->queued_tail = &c->queued;
		pthread_mutex_unlock(&c->lock);
		read_piece(me->piece);
		pthread_mutex_lock(&c->lock);
		me->copying = !me->piece->error && !atomic_load(&me->piece->cut);
		pthread_mutex_unlock(&c->lock);
		if (me->copying)
			copy_piece(me->piece);
		pthread_mutex_lock(&c->lock);
		me->copying = false;
		me->piece->next = c->done;
		c->done = me->piece;
		me->piece = NULL;
		pthread_cond_signal(&c->idle);
		if (c->asleep)
			signal_eventfd(c->event);
		c->asleep = false;
	}
	pthread_mutex_unlock(&c->lock);
	return NULL;
}

/* ---- handing over ----------------------------------------------------------------- */

/* Which copies put the piece in place; false if that is not plain. */
static bool plan(const struct task *t, struct buffer *b)
{
	const uint8_t *data = b->data, *state = t->space->state;

	b->nr_copies = 0;
	for (uint32_t i = 0; i < b->nr_runs; i++) {
		uint64_t page = b->runs[i].page, end = page + b->runs[i].nr_pages, nr;

		for (; page < end; page += nr, data += nr << PAGE_SHIFT) {
			struct copy *c = &b->copies[b->nr_copies];

			nr = 1;
			if (state[page] != CRIUPY_PAGE_MISSING)
				continue;
			while (page + nr < end && state[page + nr] == CRIUPY_PAGE_MISSING)
				nr++;
			if (criupy_space_locate(t->space, page, &c->addr, &nr))
				return false;
			c->page = page;
			c->nr_pages = nr;
			c->nr_done = 0;
			c->data = data;
			b->nr_copies++;
		}
	}
	return b->nr_copies;
}

/* A task that works needs a core more than its background does, where there is a
 * source whose pages are on their way meanwhile. Out of a file all is there at once,
 * and the sooner it is in place the fewer faults there are. */
static uint32_t nr_to_use(const struct criupy_pager *p, const struct buffer *b)
{
	bool spare_one = !b->local && !window_is_calm(&p->window, p->now_ns);

	return p->copiers->nr - (spare_one && p->copiers->nr);
}

static bool have_room(const struct criupy_pager *p, const struct buffer *b)
{
	return p->copiers && p->copiers->nr_handed < 2 * nr_to_use(p, b) && p->nr_free_buffers >= NR_SPARE;
}

bool copiers_take(struct criupy_pager *p, struct buffer *b)
{
	struct copiers *c = p->copiers;
	struct task *t = b->image->tasks;

	if (b->demand || b->nr_pages < LEAST_PAGES || !have_room(p, b))
		return false;
	if (!t || t->next_of_image || t->uffd < 0 || t->poisoned || t->cannot_take || buffer_is_waited_for(b) || !plan(t, b))
		return false;
	b->task = t;
	b->uffd = t->uffd;
	b->error = 0;
	b->next = NULL;
	atomic_store(&b->cut, false);
	buffer_mark(b);
	c->nr_handed++;
	pthread_mutex_lock(&c->lock);
	*c->queued_tail = b;
	c->queued_tail = &b->next;
	pthread_cond_signal(&c->work);
	pthread_mutex_unlock(&c->lock);
	return true;
}

/* ---- taking back ------------------------------------------------------------------- */

static void take_back(struct criupy_pager *p, struct buffer *b)
{
	bool whole = true;

	p->copiers->nr_handed--;
	buffer_unmark(b);
	if (b->local && !b->unread) {
		p->stats.pages_received += b->nr_pages;
		p->stats.local_received += b->nr_pages;
	}
	for (uint32_t i = 0; i < b->nr_copies; i++) {
		const struct copy *c = &b->copies[i];

		if (c->nr_done)
			installed(p, b->task, c->page, c->nr_done, false);
		whole = whole && c->nr_done == c->nr_pages;
	}
	if (b->error)
		pager_fail(p, -b->error);
	/* What was not even read is missing as before; the rest the pager does. */
	if (whole || b->unread)
		buffer_free(p, b);
	else
		buffer_park(p, b);
	if (p->parked)
		p->retry_parked = true;
	p->dirty = true;
}

void copiers_collect(struct criupy_pager *p)
{
	struct copiers *c = p->copiers;
	struct buffer *b, *next;

	if (!c || !c->nr_handed)
		return;
	pthread_mutex_lock(&c->lock);
	b = c->done;
	c->done = NULL;
	pthread_mutex_unlock(&c->lock);
	for (; b; b = next) {
		next = b->next;
		take_back(p, b);
	}
}

static bool is_copied_to(const struct copiers *c, const struct task *t)
{
	for (uint32_t i = 0; i < c->nr; i++)
		if (c->copiers[i].copying && c->copiers[i].piece->task == t)
			return true;
	return false;
}

void copiers_settle(struct criupy_pager *p, struct task *t)
{
	struct copiers *c = p->copiers;
	struct buffer **link;

	if (!c || !c->nr_handed)
		return;
	pthread_mutex_lock(&c->lock);
	for (link = &c->queued; *link;) {
		struct buffer *b = *link;

		if (b->task != t) {
			link = &b->next;
			continue;
		}
		*link = b->next;
		b->next = c->done;
		c->done = b;
	}
	c->queued_tail = link;
	for (uint32_t i = 0; i < c->nr; i++)
		if (c->copiers[i].piece && c->copiers[i].piece->task == t)
			atomic_store(&c->copiers[i].piece->cut, true);
	while (is_copied_to(c, t))
		pthread_cond_wait(&c->idle, &c->lock);
	pthread_mutex_unlock(&c->lock);
	copiers_collect(p);
}

bool copiers_may_sleep(struct criupy_pager *p)
{
	struct copiers *c = p->copiers;
	bool may = true;

	if (!c || !c->nr_handed)
		return true;
	pthread_mutex_lock(&c->lock);
	may = !c->done;
	c->asleep = may;
	pthread_mutex_unlock(&c->lock);
	return may;
}

void copiers_woke_us(struct criupy_pager *p)
{
	uint64_t count;

	/* Non-blocking; what is done is taken back in any case. */
	if (read(p->copiers->event, &count, sizeof(count)) < 0 && errno != EAGAIN)
		pager_fail(p, errno);
}

/* ---- life -------------------------------------------------------------------------- */

int copiers_start(struct criupy_pager *p, uint32_t nr)
{
	struct epoll_event watch = { .events = EPOLLIN };
	struct copiers *c;

	if (!nr)
		return 0;
	c = calloc(1, sizeof(*c) + nr * sizeof(c->copiers[0]));
	if (!c)
		return -ENOMEM;
	p->copiers = c;
	pthread_mutex_init(&c->lock, NULL);
	pthread_cond_init(&c->work, NULL);
	pthread_cond_init(&c->idle, NULL);
	c->queued_tail = &c->queued;
	c->watched = WATCH_COPIERS;
	watch.data.ptr = &c->watched;
	c->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (c->event < 0 || epoll_ctl(p->epoll, EPOLL_CTL_ADD, c->event, &watch) < 0)
		return -errno;
	for (; c->nr < nr; c->nr++) {
		int ret;

		c->copiers[c->nr].pager = p;
		ret = pthread_create(&c->copiers[c->nr].thread, NULL, copier_run, &c->copiers[c->nr]);
		if (ret) {
			/* It goes more slowly without. */
			pager_notice(p, CRIUPY_NOTICE_FEW_COPIERS, ret, c->nr, 0);
			break;
		}
	}
	return 0;
}

void copiers_stop(struct criupy_pager *p)
{
	struct copiers *c = p->copiers;

	if (!c)
		return;
	pthread_mutex_lock(&c->lock);
	c->stopping = true;
	pthread_cond_broadcast(&c->work);
	pthread_mutex_unlock(&c->lock);
	for (uint32_t i = 0; i < c->nr; i++)
		pthread_join(c->copiers[i].thread, NULL);
	if (c->event >= 0)
		close(c->event);
	pthread_cond_destroy(&c->idle);
	pthread_cond_destroy(&c->work);
	pthread_mutex_destroy(&c->lock);
	free(c);
	p->copiers = NULL;
}
