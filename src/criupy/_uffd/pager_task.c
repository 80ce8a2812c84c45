/* One userfaultfd: its faults and its events.
 *
 * Some facts about reading one. The kernel hands out pending faults before
 * events, always, so a fault may be read while the event that changes its
 * mapping is still behind it. From the moment an event is raised until it is
 * read, and a little longer (the raising thread must run again), every COPY and
 * ZEROPAGE to that address space answers EAGAIN. And the raising thread sleeps
 * until its event is read. So: events first within what one read returned, then
 * faults, judged by the mappings as they are now; and whatever meets EAGAIN
 * drains the descriptor before it tries again.
 *
 * munmap and mremap do not wake threads that wait for a page in the range they
 * take away, so each event ends with a wake over its range: who still has a
 * mapping there faults again, and is then judged anew. */

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "pager.h"

#define NR_MESSAGES 64
#define RETRY_READ_NS 10000000
#define NO_MEMORY_TOLD_NS UINT64_C(1000000000)

int task_add(struct criupy_pager *p, int32_t pid, int uffd, struct criupy_space *space, bool forked)
{
	struct task **tail = &p->tasks, **of_image = &space->image->tasks, *t = calloc(1, sizeof(*t));
	struct epoll_event watch = { .events = EPOLLIN, .data.ptr = t };
	int flags = fcntl(uffd, F_GETFL);

	if (!t)
		return -ENOMEM;
	/* poll(2) answers POLLERR for a blocking one, for ever. */
	if (flags < 0 || fcntl(uffd, F_SETFL, flags | O_NONBLOCK) < 0 ||
	    epoll_ctl(p->epoll, EPOLL_CTL_ADD, uffd, &watch) < 0) {
		int error = -errno;

		free(t);
		return error;
	}
	t->watched = WATCH_TASK;
	t->uffd = uffd;
	t->pid = pid;
	t->forked = forked;
	t->space = space;
	p->some_may_be_done = true;
	/* At the end: whoever walks the list while an event arrives meets the
	 * child, too. */
	while (*tail)
		tail = &(*tail)->next;
	*tail = t;
	while (*of_image)
		of_image = &(*of_image)->next_of_image;
	*of_image = t;
	p->stats.nr_live++;
	return 0;
}

void task_set_nr_waits(struct criupy_pager *p, struct task *t, size_t nr)
{
	p->nr_waits = p->nr_waits - t->nr_waits + nr;
	t->nr_waits = nr;
}

void task_attend(struct criupy_pager *p, struct task *t)
{
	if (t->attended)
		return;
	t->attended = true;
	t->next_attended = p->attended;
	p->attended = t;
}

void task_serve_later(struct criupy_pager *p, struct task *t)
{
	t->unserved = true;
	task_attend(p, t);
}

static void *grow(void *items, size_t *room, size_t nr, size_t size)
{
	size_t wanted = *room ? *room * 2 : 16;
	void *more;

	if (nr < *room)
		return items;
	more = realloc(items, wanted * size);
	if (more)
		*room = wanted;
	return more;
}

static void remember_wait(struct criupy_pager *p, struct task *t, uint64_t page)
{
	struct wait *waits;

	for (size_t i = 0; i < t->nr_waits; i++)
		if (t->waits[i].page == page)
			return;
	waits = grow(t->waits, &t->room_waits, t->nr_waits, sizeof(*waits));
	if (!waits) {
		pager_fail(p, ENOMEM);
		return;
	}
	t->waits = waits;
	waits[t->nr_waits] = (struct wait){ page, p->now_ns };
	task_set_nr_waits(p, t, t->nr_waits + 1);
	/* Copies that meet EAGAIN read the descriptor, too; nothing will become
	 * readable for what they found. */
	task_serve_later(p, t);
}

static void forget_unwanted_waits(struct criupy_pager *p, struct task *t)
{
	size_t kept = 0;

	for (size_t i = 0; i < t->nr_waits; i++)
		if (t->space->state[t->waits[i].page] == CRIUPY_PAGE_MISSING)
			t->waits[kept++] = t->waits[i];
	task_set_nr_waits(p, t, kept);
}

void no_memory(struct criupy_pager *p, const struct task *t, uint64_t addr)
{
	/* It goes on for as long as the target's cgroup is full. */
	if (!p->no_memory_told_ns || p->now_ns - p->no_memory_told_ns > NO_MEMORY_TOLD_NS) {
		p->no_memory_told_ns = p->now_ns;
		pager_notice(p, CRIUPY_NOTICE_NO_MEMORY, ENOMEM, (uint64_t)t->pid, addr);
	}
	p->no_memory_ns = p->now_ns;
}

/* A page that no image holds, or that was dropped since: it reads as zeros. */
static void serve_zero(struct criupy_pager *p, struct task *t, uint64_t addr)
{
	uint64_t progress, *again;
	int ret = criupy_uffd_zeropage(t->uffd, addr, CRIUPY_PAGE_SIZE, &progress);

	switch (ret) {
	case 0:
		p->stats.pages_zero++;
		return;
	case -EAGAIN:
		again = grow(t->zero_again, &t->room_zero_again, t->nr_zero_again, sizeof(*again));
		if (!again) {
			pager_fail(p, ENOMEM);
			return;
		}
		t->zero_again = again;
		again[t->nr_zero_again++] = addr;
		task_attend(p, t);
		return;
	case -ESRCH:
	case -ENOSPC:
		task_gone(p, t);
		return;
	case -ENOMEM:
		/* The thread faults again, which is the back-off. */
		no_memory(p, t, addr);
		__attribute__((fallthrough));
	default:
		/* EEXIST: there already. ENOENT: no longer mapped or not ours.
		 * Either way the thread must look again by itself. */
		(void)criupy_uffd_wake(t->uffd, addr, CRIUPY_PAGE_SIZE);
	}
}

static void handle_fault(struct criupy_pager *p, struct task *t, uint64_t addr)
{
	uint64_t page;

	addr &= ~(uint64_t)(CRIUPY_PAGE_SIZE - 1);
	switch (criupy_space_lookup(t->space, addr, &page)) {
	case CRIUPY_PAGE_MISSING:
	case CRIUPY_PAGE_IN_FLIGHT:
		remember_wait(p, t, page);
		return;
	default:
		/* A present page, too: mostly it came after the fault was raised
		 * (EEXIST, and a wake), but what MADV_GUARD_INSTALL took away is
		 * told by no event, and a mere wake would go on for ever. */
		serve_zero(p, t, addr);
	}
}

static void handle_fork(struct criupy_pager *p, struct task *t, int uffd)
{
	struct criupy_space *space;
	int ret = criupy_space_fork(t->space, &space);

	p->stats.nr_events_fork++;
	if (!ret) {
		ret = task_add(p, t->pid, uffd, space, true);
		if (ret)
			criupy_space_destroy(space);
	}
	if (ret) {
		/* Not closed: that would turn the child's missing pages into
		 * zeros. It waits, and the failure decides what becomes of it. */
		pager_fail(p, -ret);
		return;
	}
	p->stats.nr_forks++;
}

/* True when the lazy space changed. */
static bool handle_event(struct criupy_pager *p, struct task *t, const struct uffd_msg *msg)
{
	uint64_t start, length;
	int64_t dropped;
	int ret;

	switch (msg->event) {
	case UFFD_EVENT_FORK:
		handle_fork(p, t, (int)msg->arg.fork.ufd);
		return true;
	case UFFD_EVENT_REMAP:
		start = msg->arg.remap.from;
		length = msg->arg.remap.len;
		p->stats.nr_events_remap++;
		ret = criupy_space_remap(t->space, start, msg->arg.remap.to, length);
		if (ret)
			pager_fail(p, -ret);
		break;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		start = msg->arg.remove.start;
		length = msg->arg.remove.end - start;
		if (msg->event == UFFD_EVENT_REMOVE)
			p->stats.nr_events_remove++;
		else
			p->stats.nr_events_unmap++;
		dropped = criupy_space_remove(t->space, start, length);
		if (dropped > 0)
			p->stats.pages_dropped += (uint64_t)dropped;
		break;
	default:
		return false;
	}
	p->some_may_be_done = true;
	forget_unwanted_waits(p, t);
	(void)criupy_uffd_wake(t->uffd, start, length);
	return true;
}

static int by_address(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

/* Returns the number of messages, and whether an event was among them. */
static int read_messages(struct criupy_pager *p, struct task *t, bool *changed)
{
	struct uffd_msg messages[NR_MESSAGES];
	uint64_t faults[NR_MESSAGES];
	size_t nr_faults = 0;
	ssize_t got;

	copiers_settle(p, t);
	got = read(t->uffd, messages, sizeof(messages));
	if (got < 0) {
		if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) {
			/* A fork needs a descriptor. The event stays queued and
			 * keeps poll busy, so look away for a moment. */
			struct epoll_event off = { .events = 0, .data.ptr = t };

			pager_notice(p, CRIUPY_NOTICE_NO_DESCRIPTOR, errno, (uint64_t)t->pid, 0);
			t->retry_read_ns = p->now_ns + RETRY_READ_NS;
			task_attend(p, t);
			(void)epoll_ctl(p->epoll, EPOLL_CTL_MOD, t->uffd, &off);
		} else if (errno != EAGAIN && errno != EINTR) {
			pager_fail(p, errno);
		}
		return 0;
	}
	for (size_t i = 0; i < (size_t)got / sizeof(messages[0]); i++) {
		if (messages[i].event == UFFD_EVENT_PAGEFAULT)
			faults[nr_faults++] = messages[i].arg.pagefault.address;
		else
			*changed |= handle_event(p, t, &messages[i]);
	}
	qsort(faults, nr_faults, sizeof(faults[0]), by_address);
	p->stats.nr_faults += nr_faults;
	for (size_t i = 0; i < nr_faults && t->uffd >= 0; i++)
		if (!i || faults[i] != faults[i - 1])
			handle_fault(p, t, faults[i]);
	return (int)((size_t)got / sizeof(messages[0]));
}

void task_read(struct criupy_pager *p, struct task *t)
{
	bool changed = false;

	read_messages(p, t, &changed);
}

/* Try a descriptor again that could not be read for want of resources. */
static void read_again(struct criupy_pager *p, struct task *t)
{
	struct epoll_event on = { .events = EPOLLIN, .data.ptr = t };

	if (t->uffd < 0 || !t->retry_read_ns || p->now_ns < t->retry_read_ns)
		return;
	t->retry_read_ns = 0;
	(void)epoll_ctl(p->epoll, EPOLL_CTL_MOD, t->uffd, &on);
}

bool task_drain(struct criupy_pager *p, struct task *t)
{
	bool changed = false;

	/* A full batch means that there may be more. Bounded, because a task
	 * that faults without end must not keep others waiting. */
	for (int i = 0; i < 16 && t->uffd >= 0; i++)
		if (read_messages(p, t, &changed) < NR_MESSAGES)
			break;
	return changed;
}

/* How many pages from one on a fault asks for. All are needed once the tasks run, the
 * one that is waited for comes first, and to a source a few cost what one does. */
static uint64_t pages_around(const struct criupy_pager *p, const struct criupy_image *image,
			     const uint8_t *state, uint64_t page)
{
	const struct extent *e = image_extent_of(image, page);
	uint64_t nr = 1, most = min_u64(p->config.fault_around_pages, e->first + e->nr_pages - page);

	if (p->stats.phase != CRIUPY_PHASE_RUNNING || image_kind(image, page) == LOCAL)
		return 1;
	while (nr < most && state[page + nr] == CRIUPY_PAGE_MISSING && !image->requested[page + nr])
		nr++;
	return nr;
}

bool is_waited_for(const struct criupy_image *image, uint64_t page, uint64_t nr_pages)
{
	for (const struct task *t = image->tasks; t; t = t->next_of_image)
		for (size_t i = 0; i < t->nr_waits; i++)
			if (t->waits[i].page - page < nr_pages)
				return true;
	return false;
}

void task_serve_waits(struct criupy_pager *p, struct task *t)
{
	const struct criupy_image *image = t->space->image;
	const uint8_t *requested = image->requested, *state = t->space->state;
	size_t again = t->nr_zero_again;

	t->unserved = false;
	/* What met EAGAIN is looked up afresh: its mapping has changed. Entries
	 * that meet it again are appended behind these. */
	for (size_t i = 0; i < again && t->uffd >= 0; i++)
		handle_fault(p, t, t->zero_again[i]);
	t->nr_zero_again -= again;
	if (t->nr_zero_again)
		memmove(t->zero_again, t->zero_again + again, t->nr_zero_again * sizeof(*t->zero_again));

	/* Installing from local images takes entries out while we look, so each
	 * turn starts from what is there now. */
	for (size_t i = 0; i < t->nr_waits && t->uffd >= 0;) {
		uint64_t page = t->waits[i].page, nr = 1;
		size_t before = t->nr_waits;

		if (state[page] != CRIUPY_PAGE_MISSING || !fetch_is_due(p, image, page)) {
			i++;
			continue;
		}
		/* Neighbours in address order, as several threads running
		 * through one array make them, travel together; but what is on its
		 * way in bulk is asked for once more alone. */
		while (!requested[page] && i + nr < t->nr_waits && t->waits[i + nr].page == page + nr &&
		       !requested[page + nr])
			nr++;
		fetch_demand(p, t, page, requested[page] ? 1 : max_u64(nr, pages_around(p, image, state, page)));
		if (t->nr_waits == before)
			i += nr;
	}
}

void tasks_attend(struct criupy_pager *p)
{
	struct task *list = p->attended;

	/* Whoever is to be looked at once more comes into a new list. */
	p->attended = NULL;
	while (list) {
		struct task *t = list;

		list = t->next_attended;
		t->attended = false;
		read_again(p, t);
		if (t->nr_zero_again)
			task_drain(p, t);
		if (t->nr_zero_again || t->unserved)
			task_serve_waits(p, t);
		if (t->nr_zero_again || t->unserved || t->retry_read_ns || t->cannot_take)
			task_attend(p, t);
	}
}

void task_gone(struct criupy_pager *p, struct task *t)
{
	if (t->uffd < 0)
		return;
	copiers_settle(p, t);
	if (t->space->nr_missing) {
		p->stats.nr_gone++;
		if (!t->forked)
			pager_notice(p, CRIUPY_NOTICE_TASK_GONE, 0, (uint64_t)t->pid, t->space->nr_missing);
	}
	p->stats.pages_dropped += t->space->nr_missing;
	criupy_space_set(t->space, 0, t->space->image->nr_pages, CRIUPY_PAGE_REMOVED);
	task_release(p, t);
}

void task_release(struct criupy_pager *p, struct task *t)
{
	if (t->uffd < 0)
		return;
	copiers_settle(p, t);
	unwatch(p, t->uffd);
	close(t->uffd);
	t->uffd = -1;
	task_set_nr_waits(p, t, 0);
	p->stats.nr_live--;
	p->some_are_released = true;
}

void tasks_sweep(struct criupy_pager *p)
{
	if (!p->some_are_released)
		return;
	p->some_are_released = false;
	for (struct task **link = &p->attended; *link;)
		if ((*link)->uffd < 0)
			*link = (*link)->next_attended;
		else
			link = &(*link)->next_attended;
	for (struct task **link = &p->tasks; *link;) {
		struct task *t = *link, **of_image;

		if (t->uffd >= 0) {
			link = &t->next;
			continue;
		}
		*link = t->next;
		of_image = &t->space->image->tasks;
		while (*of_image != t)
			of_image = &(*of_image)->next_of_image;
		*of_image = t->next_of_image;
		if (p->scan == t)
			p->scan = NULL;
		criupy_space_destroy(t->space);
		free(t->waits);
		free(t->zero_again);
		free(t);
	}
}
