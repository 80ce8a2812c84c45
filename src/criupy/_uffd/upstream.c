/* What a relay fetches from the source, and holds for whoever asks for it.
 *
 * One thread has the one connection that a stock source accepts. It asks for what
 * somebody waits for and otherwise reads ahead; what comes goes into a file for each
 * image, from which the page server's threads send it. They meet here: a thread
 * holds pages while it sends them, and waits for those that are not here yet.
 *
 * The thread never waits for a client, and no thread waits for another's answer. */

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "upstream.h"

/* ---- life ---------------------------------------------------------------------------- */

int criupy_upstream_create(struct criupy_upstream **upstream, const struct criupy_upstream_config *config)
{
	struct criupy_upstream *u;
	int error;

	if (!config->link_timeout_ns)
		return -EINVAL;
	u = calloc(1, sizeof(*u));
	if (!u)
		return -ENOMEM;
	u->config = *config;
	u->stats.close_status = -1;
	u->waiters_end = &u->waiters;
	u->nr_owners = 1;
	u->command_fd = -1;
	u->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->event_fd >= 0)
		u->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->command_fd < 0)
		goto failed;
	u->payload = calloc(UPSTREAM_PAGES, CRIUPY_PAGE_SIZE);
	if (!u->payload || upstream_grow(u, 0) < 0)
		goto failed;
	pthread_mutex_init(&u->lock, NULL);
	*upstream = u;
	return 0;

failed:
	error = errno;
	if (u->command_fd >= 0)
		close(u->command_fd);
	if (u->event_fd >= 0)
		close(u->event_fd);
	free(u->state);
	free(u->nr_absent);
	free(u->payload);
	free(u);
	return -error;
}

void upstream_share(struct criupy_upstream *u)
{
	u->nr_owners++;
}

void upstream_unshare(struct criupy_upstream *u)
{
	if (--u->nr_owners)
		return;
	for (size_t i = 0; i < u->nr_images; i++) {
		criupy_image_destroy(u->images[i].image);
		close(u->images[i].fd);
	}
	free(u->images);
	free(u->state);
	free(u->nr_absent);
	free(u->kept.items);
	free(u->served.items);
	free(u->payload);
	pthread_mutex_destroy(&u->lock);
	close(u->event_fd);
	close(u->command_fd);
	free(u);
}

void criupy_upstream_destroy(struct criupy_upstream *upstream)
{
	if (!upstream)
		return;
	pthread_mutex_lock(&upstream->lock);
	upstream->stopping = true;
	pthread_mutex_unlock(&upstream->lock);
	upstream_wake_fd(upstream->command_fd);
	if (upstream->started)
		pthread_join(upstream->thread, NULL);
	upstream_wake(upstream);
	upstream_unshare(upstream);
}

int criupy_upstream_add_image(struct criupy_upstream *upstream, struct criupy_image *image, int fd)
{
	int result = 0;

	if (!image->has_data)
		return -EINVAL;
	if (upstream->started)
		return -EBUSY;
	for (size_t i = 0; i < upstream->nr_images; i++)
		if (upstream->images[i].image->id == image->id)
			return -EEXIST;
	if (upstream->nr_images == upstream->room_images) {
		size_t room = upstream->room_images ? 2 * upstream->room_images : 8;
		struct upstream_image *images = realloc(upstream->images, room * sizeof(*images));

		if (!images)
			return -ENOMEM;
		upstream->images = images;
		upstream->room_images = room;
	}
	pthread_mutex_lock(&upstream->lock);
	upstream->images[upstream->nr_images].first = upstream->stats.pages_total;
	result = upstream_grow(upstream, image->nr_pages);
	pthread_mutex_unlock(&upstream->lock);
	if (result < 0)
		return result;
	upstream->images[upstream->nr_images].image = image;
	upstream->images[upstream->nr_images].fd = fd;
	upstream->nr_images++;
	return 0;
}

int criupy_upstream_start(struct criupy_upstream *upstream, int fd, int frame_size)
{
	/* Should this process die, the source goes on. */
	const struct linger reset = { .l_onoff = 1, .l_linger = 0 };
	int flags = fcntl(fd, F_GETFL), one = 1, error;
	sigset_t all, before;

	if (frame_size != CRIUPY_FRAME_24 && frame_size != CRIUPY_FRAME_32)
		return -EINVAL;
	if (upstream->started)
		return -EBUSY;
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)) < 0)
		return -errno;
	/* Where there is no TCP there is nothing to hurry. */
	(void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (upstream->config.cache_pages && !upstream->kept.items && upstream_make_rings(upstream) < 0)
		return -ENOMEM;
	link_init(&upstream->link, fd, NULL);
	upstream->frame_size = (size_t)frame_size;
	pthread_mutex_lock(&upstream->lock);
	upstream->stats.state = CRIUPY_LINK_OPEN;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&upstream->thread, NULL, upstream_thread, upstream);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	upstream->started = !error;
	if (error)
		upstream->stats.state = CRIUPY_LINK_NONE;
	pthread_mutex_unlock(&upstream->lock);
	return -error;
}

/* ---- from Python ------------------------------------------------------------------------ */

void upstream_wake_fd(int fd)
{
	uint64_t one = 1;

	/* It can fail only when the counter is full, and then it is readable. */
	if (write(fd, &one, sizeof(one)) < 0)
		return;
}

int criupy_upstream_event_fd(const struct criupy_upstream *upstream)
{
	return upstream->event_fd;
}

void criupy_upstream_snapshot(struct criupy_upstream *upstream, struct criupy_upstream_stats *stats)
{
	pthread_mutex_lock(&upstream->lock);
	*stats = upstream->stats;
	pthread_mutex_unlock(&upstream->lock);
	stats->complete = stats->pages_kept == stats->pages_total;
}

static int command(struct criupy_upstream *u, bool *what)
{
	int result = 0;

	pthread_mutex_lock(&u->lock);
	if (u->stats.state == CRIUPY_LINK_NONE)
		result = -ENOTCONN;
	else
		*what = true;
	pthread_mutex_unlock(&u->lock);
	upstream_wake_fd(u->command_fd);
	return result;
}

int criupy_upstream_close(struct criupy_upstream *upstream)
{
	int result = command(upstream, &upstream->closing);

	/* What was not asked for does not come any more. */
	upstream_wake(upstream);
	return result;
}

int criupy_upstream_reset(struct criupy_upstream *upstream)
{
	return command(upstream, &upstream->resetting);
}

int criupy_upstream_leave(struct criupy_upstream *upstream)
{
	return command(upstream, &upstream->leaving);
}

/* ---- from the server's threads ------------------------------------------------------------ */

void upstream_tell(struct criupy_upstream *u, struct upstream_run run)
{
	for (struct upstream_waiter *w = u->waiters; w; w = w->next)
		if (run.page <= w->run.page && w->run.page - run.page < run.nr)
			pthread_cond_signal(&w->changed);
}

void upstream_disk_failed(struct criupy_upstream *u, int error)
{
	if (!u->stats.disk_error)
		u->stats.disk_error = error;
	upstream_tell(u, (struct upstream_run){ 0, UINT64_MAX });
	upstream_wake_fd(u->event_fd);
}

void upstream_wake(struct criupy_upstream *u)
{
	pthread_mutex_lock(&u->lock);
	upstream_tell(u, (struct upstream_run){ 0, UINT64_MAX });
	pthread_mutex_unlock(&u->lock);
}

/* The source was told so: who got the rest from us would run beside it. */
static bool source_goes_on(const struct criupy_upstream *u)
{
	return u->stats.state == CRIUPY_LINK_RESET || (u->resetting && u->stats.state != CRIUPY_LINK_CLOSED);
}

/* Why a page that is not here will not come; 0 when it may. */
static int hopeless(const struct criupy_upstream *u, uint64_t page)
{
	if (u->state[page] == UPSTREAM_ASKED)
		return 0;
	if (u->stats.disk_error)
		return -u->stats.disk_error;
	if (source_goes_on(u))
		return -ESHUTDOWN;
	if (u->stopping || u->closing || u->stats.state > CRIUPY_LINK_OPEN)
		return -EPIPE;
	return 0;
}

int upstream_check(struct criupy_upstream *u, uint64_t page, uint64_t nr)
{
	int result;

	pthread_mutex_lock(&u->lock);
	result = source_goes_on(u) ? -ESHUTDOWN : 0;
	for (uint64_t i = 0; i < nr && !result; i++)
		if (!upstream_is_here(u, page + i))
			result = hopeless(u, page + i);
	pthread_mutex_unlock(&u->lock);
	return result;
}

/* Wait, with the lock held. The first in the list has waited longest. */
static int wait_for(struct criupy_upstream *u, struct upstream_run run, const _Atomic bool *cut)
{
	struct upstream_waiter w = { .run = run, .link = u->waiters_end };
	int result = 0;

	pthread_cond_init(&w.changed, NULL);
	*w.link = &w;
	u->waiters_end = &w.next;
	upstream_wake_fd(u->command_fd);
	while (!upstream_is_here(u, run.page)) {
		result = *cut ? -ECANCELED : hopeless(u, run.page);
		if (result < 0)
			break;
		pthread_cond_wait(&w.changed, &u->lock);
	}
	*w.link = w.next;
	if (w.next)
		w.next->link = w.link;
	else
		u->waiters_end = w.link;
	pthread_cond_destroy(&w.changed);
	return result;
}

int upstream_hold(struct criupy_upstream *u, uint64_t page, uint64_t nr, const _Atomic bool *cut,
		  struct upstream_pin *pin, uint64_t *got)
{
	int result = 0;

	pthread_mutex_lock(&u->lock);
	if (!upstream_is_here(u, page))
		result = cut ? wait_for(u, (struct upstream_run){ page, nr }, cut) : -EAGAIN;
	if (!result && source_goes_on(u))
		result = -ESHUTDOWN;
	if (result < 0)
		goto out;
	if (u->config.cache_pages)
		nr = min_u64(nr, max_u64(u->config.cache_pages / 8, 1));
	for (*got = 1; *got < nr && upstream_is_here(u, page + *got);)
		++*got;
	*pin = (struct upstream_pin){ .run = { page, *got }, .next = u->pins, .link = &u->pins };
	if (pin->next)
		pin->next->link = &pin->next;
	u->pins = pin;
	u->cursor = page + *got;
out:
	pthread_mutex_unlock(&u->lock);
	return result;
}

void upstream_release(struct criupy_upstream *u, struct upstream_pin *pin, bool served)
{
	bool starved;

	pthread_mutex_lock(&u->lock);
	*pin->link = pin->next;
	if (pin->next)
		pin->next->link = pin->link;
	if (served)
		upstream_give(u, pin->run);
	starved = u->starved;
	u->starved = false;
	pthread_mutex_unlock(&u->lock);
	if (starved)
		upstream_wake_fd(u->command_fd);
}
