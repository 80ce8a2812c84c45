/* The pager: one thread that owns every descriptor a page's life touches.
 *
 * It serves all tasks of a restore, so that a fault never waits for a lock, for
 * the interpreter or for another thread to be scheduled. Each turn of its loop
 * does little of everything, faults first:
 *
 *   commands, faults and events of every readable task, requests for them,
 *   what the source sent (at most a quarter of a megabyte), copies the kernel
 *   would not take before, then background requests into what is left of the
 *   window.
 *
 * Python talks to it by commands (a list under a mutex, an eventfd) and listens
 * through a snapshot of the counters, a ring of notices and another eventfd. */

#include <fcntl.h>
#include <linux/time_types.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pager.h"

#define NR_EVENTS 64
#define PUBLISH_NS 20000000
#define BUSY_NS 50000
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

static void signal_eventfd(int fd)
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
	p->stats.pages_missing = 0;
	for (struct task *t = p->tasks; t; t = t->next)
		if (t->uffd >= 0)
			p->stats.pages_missing += t->space->nr_missing;
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
		link_open(p, c->fd, c->value, c->shared);
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

static int tell(struct criupy_pager *p, struct command command)
{
	struct command **tail = &p->commands, *c = malloc(sizeof(*c));

	if (!c)
		return -ENOMEM;
	*c = command;
	c->next = NULL;
	pthread_mutex_lock(&p->lock);
	while (*tail)
		tail = &(*tail)->next;
	*tail = c;
	pthread_mutex_unlock(&p->lock);
	signal_eventfd(p->control);
	return 0;
}

/* ---- the loop -------------------------------------------------------------------- */

static uint64_t sleep_ns(const struct criupy_pager *p, bool more)
{
	if (more || p->stopping)
		return 0;
	if (p->busy)
		return BUSY_NS;
	if (p->farewell_ns)
		return TICK_NS / 10;
	for (struct task *t = p->tasks; t; t = t->next)
		if (t->nr_zero_again || t->unserved)
			return BUSY_NS;
		else if (t->retry_read_ns)
			return TICK_NS / 5;
	if (p->dirty)
		return PUBLISH_NS;
	if (p->nr_requests || p->close_sent)
		return TICK_NS;
	return UINT64_MAX;
}

static int wait_events(struct criupy_pager *p, struct epoll_event *events, uint64_t ns)
{
	struct __kernel_timespec ts = { (long long)(ns / 1000000000u), (long long)(ns % 1000000000u) };
	int nr = (int)syscall(SYS_epoll_pwait2, p->epoll, events, NR_EVENTS,
			      ns == UINT64_MAX ? NULL : &ts, NULL, 0);

	if (nr < 0 && errno == ENOSYS) {
		int ms = ns == UINT64_MAX ? -1 : (int)((ns + 999999) / 1000000);

		nr = epoll_wait(p->epoll, events, NR_EVENTS, ms);
	}
	return nr;
}

static void turn(struct criupy_pager *p, bool *more)
{
	struct epoll_event events[NR_EVENTS];
	bool control = false, restore = false, link = false;
	int nr = wait_events(p, events, sleep_ns(p, *more));

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
		case WATCH_LINK:
			link = true;
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
	link_flush(p);
	if (control)
		obey_all(p);
	if (restore)
		restore_read(p);
	if (link)
		link_read(p);
	if (p->busy)
		install_parked(p);
	for (struct task *t = p->tasks; t; t = t->next) {
		task_read_again(p, t);
		if (t->nr_zero_again)
			task_drain(p, t);
		if (t->nr_zero_again || t->unserved)
			task_serve_waits(p, t);
	}
	*more = fetch_background(p);
	link_flush(p);
	if (p->stats.link == CRIUPY_LINK_OPEN && (p->nr_requests || p->close_sent) &&
	    p->now_ns - p->link_heard_ns > p->config.link_timeout_ns)
		link_lost(p, ETIMEDOUT);
	check_done(p);
	tasks_sweep(p);
	if (p->dirty && p->now_ns - p->published_ns >= PUBLISH_NS)
		copy_stats(p);
}

static void *run(void *arg)
{
	struct criupy_pager *p = arg;
	bool more = false;

	pthread_setname_np(pthread_self(), "criupy-pager");
	while (!p->stopping)
		turn(p, &more);
	/* The link's own end; a source that does not answer is not waited for. */
	if (p->stats.phase == CRIUPY_PHASE_CLOSING && p->stats.link == CRIUPY_LINK_OPEN)
		link_lost(p, ECANCELED);
	check_done(p);
	return NULL;
}

/* ---- life ------------------------------------------------------------------------- */

static int make_staging(struct criupy_pager *p)
{
	size_t each = (size_t)p->config.request_pages << PAGE_SHIFT;
	void *memory;

	p->staging_length = each * p->config.nr_buffers;
	p->buffers = calloc(p->config.nr_buffers, sizeof(*p->buffers));
	if (!p->buffers)
		return -ENOMEM;
	memory = mmap(NULL, p->staging_length, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		return -errno;
	p->staging = memory;
	/* A fault on the source of a copy sends the kernel the slow way round;
	 * worse, under memory pressure it waits for swap. */
	if (mlock(p->staging, p->staging_length) < 0)
		pager_notice(p, CRIUPY_NOTICE_NOT_LOCKED, errno, p->staging_length, 0);
	for (uint32_t i = 0; i < p->config.nr_buffers; i++) {
		p->buffers[i].data = p->staging + i * each;
		buffer_free(p, &p->buffers[i]);
	}
	return 0;
}

static void release(struct criupy_pager *p)
{
	struct criupy_image *image, *next;
	struct command *c, *next_command;

	for (struct task *t = p->tasks; t; t = t->next)
		task_release(p, t);
	tasks_sweep(p);
	for (c = p->commands; c; c = next_command) {
		/* Told, but the thread had stopped: still ours to release. */
		next_command = c->next;
		if (c->kind == COMMAND_LINK || c->kind == COMMAND_TASK || c->kind == COMMAND_RESTORE)
			close(c->fd);
		criupy_image_destroy(c->image);
		free(c);
	}
	for (image = p->images; image; image = next) {
		next = image->next;
		criupy_image_destroy(image);
	}
	if (p->staging)
		munmap(p->staging, p->staging_length);
	free(p->buffers);
	free(p->requests);
	free(p->out);
	if (p->restore >= 0)
		close(p->restore);
	if (p->link.fd >= 0)
		link_close(&p->link);
	if (p->epoll >= 0)
		close(p->epoll);
	if (p->control >= 0)
		close(p->control);
	if (p->event >= 0)
		close(p->event);
	pthread_mutex_destroy(&p->lock);
	free(p);
}

int criupy_pager_create(struct criupy_pager **pager, const struct criupy_pager_config *config)
{
	struct epoll_event watch = { .events = EPOLLIN };
	struct criupy_pager *p;
	sigset_t all, before;
	int ret;

	if (config->nr_buffers < 2 || !config->request_pages || config->request_pages > 4096 ||
	    !config->link_timeout_ns)
		return -EINVAL;
	p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->config = *config;
	p->watch_control = WATCH_CONTROL;
	p->watch_restore = WATCH_RESTORE;
	p->watch_link = WATCH_LINK;
	p->restore = -1;
	p->link.fd = -1;
	p->parked_tail = &p->parked;
	p->stats.close_status = -1;
	p->stats.created_ns = p->now_ns = monotonic_ns();
	p->published = p->stats;
	pthread_mutex_init(&p->lock, NULL);
	p->epoll = epoll_create1(EPOLL_CLOEXEC);
	p->control = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	p->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	watch.data.ptr = &p->watch_control;
	ret = -errno;
	if (p->epoll < 0 || p->control < 0 || p->event < 0 ||
	    epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->control, &watch) < 0) {
		ret = -errno;
		release(p);
		return ret;
	}
	ret = make_staging(p);
	if (!ret) {
		/* Signals are for the interpreter's main thread. */
		sigfillset(&all);
		pthread_sigmask(SIG_SETMASK, &all, &before);
		ret = -pthread_create(&p->thread, NULL, run, p);
		pthread_sigmask(SIG_SETMASK, &before, NULL);
	}
	if (ret) {
		release(p);
		return ret;
	}
	*pager = p;
	return 0;
}

void criupy_pager_destroy(struct criupy_pager *pager)
{
	if (!pager)
		return;
	/* Without memory for a command, the flag itself would be a race; but
	 * this must not fail, so it is tried until it does not. */
	while (tell(pager, (struct command){ .kind = COMMAND_STOP }))
		nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
	pthread_join(pager->thread, NULL);
	release(pager);
}

int criupy_pager_event_fd(const struct criupy_pager *pager)
{
	return pager->event;
}

void criupy_pager_snapshot(struct criupy_pager *pager, struct criupy_stats *stats)
{
	pthread_mutex_lock(&pager->lock);
	*stats = pager->published;
	pthread_mutex_unlock(&pager->lock);
}

int criupy_pager_next_notice(struct criupy_pager *pager, struct criupy_notice *notice)
{
	return notices_pop(&pager->notices, notice);
}

int criupy_pager_set_link(struct criupy_pager *pager, int fd, int frame_size, int shared)
{
	int flags = fcntl(fd, F_GETFL);

	if (frame_size != CRIUPY_FRAME_24 && frame_size != CRIUPY_FRAME_32)
		return -EINVAL;
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	return tell(pager, (struct command){ .kind = COMMAND_LINK, .fd = fd, .value = frame_size,
					     .shared = shared });
}

int criupy_pager_add_task(struct criupy_pager *pager, int32_t pid, int uffd, struct criupy_image *image)
{
	return tell(pager, (struct command){ .kind = COMMAND_TASK, .fd = uffd, .pid = pid, .image = image });
}

int criupy_pager_watch_restore(struct criupy_pager *pager, int fd)
{
	return tell(pager, (struct command){ .kind = COMMAND_RESTORE, .fd = fd });
}

int criupy_pager_abort(struct criupy_pager *pager)
{
	return tell(pager, (struct command){ .kind = COMMAND_ABORT });
}

int criupy_pager_give_up(struct criupy_pager *pager)
{
	return tell(pager, (struct command){ .kind = COMMAND_GIVE_UP });
}

int criupy_pager_poison(struct criupy_pager *pager)
{
	return tell(pager, (struct command){ .kind = COMMAND_POISON });
}

int criupy_pager_probe(struct criupy_pager *pager)
{
	return tell(pager, (struct command){ .kind = COMMAND_PROBE });
}

int criupy_pager_end(struct criupy_pager *pager, int reset)
{
	return tell(pager, (struct command){ .kind = COMMAND_END, .value = reset });
}
