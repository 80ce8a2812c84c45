/* The pager: one thread that owns every descriptor a page's life touches.
 *
 * It serves all tasks of a restore, so that a fault does not wait for the interpreter
 * or for another thread to be scheduled; only for a copier to end the step that it is
 * in (pager_copier.c). Each turn of its loop does little of everything, faults first:
 *
 *   commands, faults and events of every readable task, requests for them,
 *   what the source sent (at most a quarter of a megabyte), a piece that had to
 *   wait because somebody waits for another one, copies the kernel would not take
 *   before, then background requests into what is left of the window.
 *
 * Python talks to it by commands (a list under a mutex, an eventfd) and listens
 * through a snapshot of the counters, a ring of notices and another eventfd. */

#include <linux/time_types.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pager.h"

#define NR_EVENTS 64
#define PUBLISH_NS 20000000
#define RETRY_NS 50000
#define IDLE_NS 60000	/* nothing was heard: there is time for what was deferred */
#define NO_MEMORY_NS 2000000
#define TICK_NS 50000000

#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441	/* Linux 5.11 */
#endif

uint64_t monotonic_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void unwatch(struct criupy_pager *p, int fd)
{
	/* Fails where it is not watched, which is the aim. */
	(void)epoll_ctl(p->epoll, EPOLL_CTL_DEL, fd, NULL);
}

void signal_eventfd(int fd)
{
	const uint64_t one = 1;

	/* Fails only when the counter is full, and then it is readable. */
	if (write(fd, &one, sizeof(one)) < 0)
		return;
}

void pager_notice(struct criupy_pager *p, uint32_t kind, int error, uint64_t a, uint64_t b)
{
	if (!notices_push(&p->notices, (struct criupy_notice){ kind, error, a, b }))
		p->stats.nr_notices_lost++;
	signal_eventfd(p->event);
}

static void copy_stats(struct criupy_pager *p)
{
	const struct lane *bulk = bulk_lane(p), *urgent = urgent_lane(p);

	p->stats.link = bulk->state;
	p->stats.link_error = bulk->error;
	p->stats.urgent_link = urgent->state;
	p->stats.urgent_error = urgent->error;
	p->stats.window_pages = p->window.pages;
	p->stats.rtt_ns = p->window.rtt_ns;
	p->stats.refused = bulk->refused ? bulk->refused : urgent->refused;
	p->stats.pages_missing = p->stats.local_missing = 0;
	for (struct task *t = p->tasks; t; t = t->next) {
		if (t->uffd < 0)
			continue;
		p->stats.pages_missing += t->space->nr_missing;
		p->stats.local_missing += t->space->local_missing;
	}
	pthread_mutex_lock(&p->lock);
	p->published = p->stats;
	pthread_mutex_unlock(&p->lock);
	p->published_ns = p->now_ns;
	p->dirty = false;
}

void pager_publish(struct criupy_pager *p)
{
	copy_stats(p);
	signal_eventfd(p->event);
}

void pager_set_phase(struct criupy_pager *p, uint32_t phase)
{
	p->stats.phase = phase;
	if (phase == CRIUPY_PHASE_ENDED)
		p->stats.ended_ns = monotonic_ns();
	pager_publish(p);
}

void pager_fail(struct criupy_pager *p, int error)
{
	if (p->stats.error)
		return;
	p->stats.error = error;
	pager_publish(p);
}

/* ---- commands ------------------------------------------------------------------- */

static void add_task(struct criupy_pager *p, struct command *c)
{
	struct criupy_space *space;
	int ret;

	/* The pager keeps the image whatever happens, and the descriptor, too:
	 * closing it is for whoever decides about the failure. */
	c->image->next = p->images;
	p->images = c->image;
	ret = criupy_space_create(&space, c->image);
	if (!ret) {
		ret = task_add(p, c->pid, c->fd, space, false);
		if (ret)
			criupy_space_destroy(space);
	}
	if (ret) {
		pager_fail(p, -ret);
		return;
	}
	p->stats.nr_tasks++;
	p->stats.pages_total += c->image->nr_pages;
	p->stats.local_total += c->image->nr_pages - c->image->first_local;
	p->some_are_local |= c->image->first_local < c->image->nr_pages;
}

static void watch_restore(struct criupy_pager *p, int fd)
{
	struct epoll_event watch = { .events = EPOLLIN, .data.ptr = &p->watch_restore };

	p->restore = fd;
	if (epoll_ctl(p->epoll, EPOLL_CTL_ADD, fd, &watch) < 0)
		pager_fail(p, errno);
}

static void stop(struct criupy_pager *p)
{
	restore_abort(p);
	end_link(p, false);
	p->stopping = true;
}

static void obey(struct criupy_pager *p, struct command *c)
{
	switch (c->kind) {
	case COMMAND_LINK:
		lane_open(p, c);
		break;
	case COMMAND_DROP_LINK:
		lane_drop(p, &p->lanes[c->lane]);
		break;
	case COMMAND_TASK:
		add_task(p, c);
		break;
	case COMMAND_RESTORE:
		watch_restore(p, c->fd);
		break;
	case COMMAND_ABORT:
		restore_abort(p);
		break;
	case COMMAND_GIVE_UP:
		p->given_up = true;
		break;
	case COMMAND_POISON:
		poison_all(p);
		break;
	case COMMAND_PROBE:
		probe_all(p);
		break;
	case COMMAND_END:
		end_link(p, c->value);
		break;
	case COMMAND_STOP:
		stop(p);
		break;
	}
}

static void obey_all(struct criupy_pager *p)
{
	struct command *c, *next;
	uint64_t count;

	/* Non-blocking; the commands themselves are what counts. */
	if (read(p->control, &count, sizeof(count)) < 0 && errno != EAGAIN)
		pager_fail(p, errno);
	pthread_mutex_lock(&p->lock);
	c = p->commands;
	p->commands = NULL;
	pthread_mutex_unlock(&p->lock);
	for (; c; c = next) {
		next = c->next;
		obey(p, c);
		free(c);
		p->stats.nr_obeyed++;
	}
	pager_publish(p);
}

/* ---- the loop -------------------------------------------------------------------- */

static bool lane_pending(const struct lane *l)
{
	return l->state == CRIUPY_LINK_OPEN && link_pending(&l->link);
}

static bool lane_waits(const struct lane *l)
{
	return l->state == CRIUPY_LINK_OPEN && (!lane_is_idle(l) || l->close_sent);
}

static uint64_t sleep_ns(const struct criupy_pager *p, bool more)
{
	const struct lane *bulk = &p->lanes[CRIUPY_LANE_BULK], *urgent = &p->lanes[CRIUPY_LANE_URGENT];

	if (more || p->stopping || p->deferred_is_waited_for || lane_pending(bulk) || lane_pending(urgent))
		return 0;
	if (p->deferred)
		return p->nr_waits ? IDLE_NS : 0;
	if (p->retry_parked)
		return p->now_ns - p->no_memory_ns < TICK_NS ? NO_MEMORY_NS : RETRY_NS;
	if (bulk->farewell_ns)
		return TICK_NS / 10;
	for (struct task *t = p->attended; t; t = t->next_attended)
		if (t->nr_zero_again || t->unserved)
			return RETRY_NS;
	if (p->attended)
		return TICK_NS / 5; /* a descriptor to be read again */
	if (p->held_back)
		return STANDS_STILL_NS;
	if (p->dirty)
		return PUBLISH_NS;
	if (lane_waits(bulk) || lane_waits(urgent))
		return TICK_NS;
	return UINT64_MAX;
}

void busy_poll(struct criupy_pager *p)
{
	if (p->window.rtt_ns < p->config.busy_poll_ns)
		p->poll_until_ns = monotonic_ns() + p->config.busy_poll_ns;
}

static int wait_events(struct criupy_pager *p, struct epoll_event *events, uint64_t ns)
{
	struct __kernel_timespec ts = { (long long)(ns / 1000000000u), (long long)(ns % 1000000000u) };
	int nr = 0;

	/* To be woken takes longer than what is waited for. Others may have the
	 * core meanwhile: the source, if it is on this machine, or who waits. */
	for (; ns > RETRY_NS && p->poll_until_ns; sched_yield()) {
		nr = epoll_wait(p->epoll, events, NR_EVENTS, 0);
		if (nr)
			return nr;
		if (monotonic_ns() >= p->poll_until_ns)
			p->poll_until_ns = 0;
	}
	nr = (int)syscall(SYS_epoll_pwait2, p->epoll, events, NR_EVENTS,
			  ns == UINT64_MAX ? NULL : &ts, NULL, 0);
	if (nr < 0 && errno == ENOSYS) {
		int ms = ns == UINT64_MAX ? -1 : (int)((ns + 999999) / 1000000);

		nr = epoll_wait(p->epoll, events, NR_EVENTS, ms);
	}
	return nr;
}

static void lanes_flush(struct criupy_pager *p)
{
	for (int i = NR_LANES - 1; i >= 0; i--)
		lane_flush(p, &p->lanes[i]);
}

static void turn(struct criupy_pager *p, bool *more)
{
	struct epoll_event events[NR_EVENTS];
	bool control = false, restore = false, came = false, heard[NR_LANES] = { false };
	uint64_t ns = sleep_ns(p, *more);
	int nr = wait_events(p, events, ns && copiers_may_sleep(p) ? ns : 0);

	p->now_ns = monotonic_ns();
	if (nr < 0 && errno != EINTR) {
		pager_fail(p, errno);
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	}
	if (nr > 0)
		p->dirty = true;
	for (int i = 0; i < nr; i++) {
		enum watched *watched = events[i].data.ptr;

		switch (*watched) {
		case WATCH_CONTROL:
			control = true;
			break;
		case WATCH_RESTORE:
			restore = true;
			break;
		case WATCH_LANE:
			heard[(struct lane *)(void *)watched - p->lanes] = true;
			break;
		case WATCH_COPIERS:
			copiers_woke_us(p);
			break;
		case WATCH_TASK:
			task_read(p, (struct task *)(void *)watched);
			break;
		}
	}
	for (int i = 0; i < nr; i++) {
		enum watched *watched = events[i].data.ptr;

		if (*watched == WATCH_TASK)
			task_serve_waits(p, (struct task *)(void *)watched);
	}
	lanes_flush(p);
	if (control)
		obey_all(p);
	if (restore)
		restore_read(p);
	/* What is urgent first. */
	for (int i = NR_LANES - 1; i >= 0 && p->nr_waits; i--)
		lane_install_waited_for(p, &p->lanes[i]);
	for (int i = NR_LANES - 1; i >= 0; i--) {
		if (!heard[i] && !lane_pending(&p->lanes[i]))
			continue;
		came = true;
		lane_read(p, &p->lanes[i]);
	}
	copiers_collect(p);
	install_deferred(p, !nr);
	if (p->retry_parked)
		install_parked(p);
	tasks_attend(p);
	fetch_held_back(p);
	*more = fetch_background(p, came);
	lanes_flush(p);
	for (int i = 0; i < NR_LANES; i++)
		if (lane_waits(&p->lanes[i]) && p->now_ns - p->lanes[i].heard_ns > p->config.link_timeout_ns)
			lane_abandon(p, &p->lanes[i], ETIMEDOUT);
	check_done(p);
	tasks_sweep(p);
	if (p->dirty && p->now_ns - p->published_ns >= PUBLISH_NS)
		copy_stats(p);
}

void *pager_run(void *arg)
{
	struct criupy_pager *p = arg;
	bool more = false;

	pthread_setname_np(pthread_self(), "criupy-pager");
	while (!p->stopping)
		turn(p, &more);
	/* The link's own end; a source that does not answer is not waited for. */
	if (p->stats.phase == CRIUPY_PHASE_CLOSING)
		lane_abandon(p, bulk_lane(p), ECANCELED);
	check_done(p);
	return NULL;
}
