/* What Python calls: making and ending a pager, telling it, asking it.
 *
 * All of it may be called while the thread runs. A command goes into a list
 * under the mutex and an eventfd wakes the thread; counters are copied out under
 * the same mutex; nothing else is shared but the ring of notices. */

#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "pager.h"

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

/* ---- life ------------------------------------------------------------------------- */

static int make_staging(struct criupy_pager *p)
{
	const size_t each = PIECE_PAGES << PAGE_SHIFT;
	void *memory;

	p->staging_length = each * p->config.nr_buffers;
	p->buffers = calloc(p->config.nr_buffers, sizeof(*p->buffers));
	p->staging_runs = calloc((size_t)p->config.nr_buffers * PIECE_PAGES, sizeof(*p->staging_runs));
	p->staging_copies = calloc((size_t)p->config.nr_buffers * PIECE_PAGES, sizeof(*p->staging_copies));
	if (!p->buffers || !p->staging_runs || !p->staging_copies)
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
		p->buffers[i].runs = p->staging_runs + i * PIECE_PAGES;
		p->buffers[i].copies = p->staging_copies + i * PIECE_PAGES;
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
	copiers_stop(p);
	for (c = p->commands; c; c = next_command) {
		/* Told, but the thread had stopped: still ours to release. */
		next_command = c->next;
		if (c->kind == COMMAND_LINK || c->kind == COMMAND_TASK || c->kind == COMMAND_RESTORE)
			close(c->fd);
		if (c->transport)
			c->transport->destroy(c->transport);
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
	free(p->staging_runs);
	free(p->staging_copies);
	if (p->restore >= 0)
		close(p->restore);
	lanes_free(p);
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

	if (config->nr_buffers < NR_SPARE || !config->request_pages || config->request_pages > 4096 ||
	    !config->fault_around_pages || config->nr_copiers > 16 || !config->link_timeout_ns)
		return -EINVAL;
	p = calloc(1, sizeof(*p));
	if (!p)
		return -ENOMEM;
	p->config = *config;
	p->watch_control = WATCH_CONTROL;
	p->watch_restore = WATCH_RESTORE;
	p->restore = -1;
	lanes_init(p);
	p->parked_tail = &p->parked;
	p->deferred_tail = &p->deferred;
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
		ret = copiers_start(p, p->config.nr_copiers);
		if (!ret)
			ret = -pthread_create(&p->thread, NULL, pager_run, p);
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

int criupy_pager_set_link(struct criupy_pager *pager, int fd, int frame_size, int flags, int lane,
			  struct criupy_transport *transport, const uint8_t *preamble,
			  size_t preamble_length)
{
	struct command command = { .kind = COMMAND_LINK, .fd = fd, .value = frame_size, .flags = flags,
				   .lane = lane, .transport = transport };
	int status;

	if (frame_size != CRIUPY_FRAME_24 && frame_size != CRIUPY_FRAME_32)
		return -EINVAL;
	if ((flags & CRIUPY_LINK_EXTENDED) && frame_size != CRIUPY_FRAME_32)
		return -EINVAL;
	if (lane != CRIUPY_LANE_BULK && (lane != CRIUPY_LANE_URGENT || !(flags & CRIUPY_LINK_EXTENDED)))
		return -EINVAL;
	if (preamble_length > sizeof(command.preamble))
		return -EINVAL;
	status = fcntl(fd, F_GETFL);
	if (status < 0 || fcntl(fd, F_SETFL, status | O_NONBLOCK) < 0)
		return -errno;
	if (preamble_length)
		memcpy(command.preamble, preamble, preamble_length);
	command.preamble_length = preamble_length;
	return tell(pager, command);
}

int criupy_pager_drop_link(struct criupy_pager *pager, int lane)
{
	if (lane != CRIUPY_LANE_BULK && lane != CRIUPY_LANE_URGENT)
		return -EINVAL;
	return tell(pager, (struct command){ .kind = COMMAND_DROP_LINK, .lane = lane });
}

int criupy_pager_add_task(struct criupy_pager *pager, int32_t pid, int uffd, struct criupy_image *image)
{
	if (image->nr_files != image->nr_files_needed)
		return -EINVAL;
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
