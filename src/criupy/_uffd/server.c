/* The page server, as Python drives it: images go in, then connected sockets,
 * and out come the accounts of connections that have ended, and the questions
 * of uploads. */

#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "server.h"

uint64_t server_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* ---- life ------------------------------------------------------------------------- */

int criupy_server_create(struct criupy_server **server, const struct criupy_server_config *config)
{
	struct criupy_server *s;
	int error;

	if (!config->stall_timeout_ns)
		return -EINVAL;
	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->config = *config;
	s->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (s->event_fd < 0) {
		error = errno;
		free(s);
		return -error;
	}
	pthread_mutex_init(&s->lock, NULL);
	*server = s;
	return 0;
}

/* Wake the thread of a connection, which then ends. */
static void cut(struct connection *c)
{
	if (c->account.ended || c->cut)
		return;
	c->cut = true;
	(void)shutdown(c->fd, SHUT_RDWR);
	pthread_cond_signal(&c->answered);
	if (c->server->upstream)
		upstream_wake(c->server->upstream);
}

static void connection_free(struct connection *c)
{
	pthread_join(c->thread, NULL);
	upload_free(c->server, c->upload);
	pthread_cond_destroy(&c->answered);
	free(c);
}

void criupy_server_destroy(struct criupy_server *server)
{
	struct connection *c, *next;

	if (!server)
		return;
	pthread_mutex_lock(&server->lock);
	for (c = server->connections; c; c = c->next)
		cut(c);
	pthread_mutex_unlock(&server->lock);
	for (c = server->connections; c; c = next) {
		next = c->next;
		connection_free(c);
	}
	if (server->upstream) {
		server_forget(server, server->upstream);
		upstream_unshare(server->upstream);
	}
	for (size_t i = 0; i < server->nr_images; i++) {
		criupy_image_destroy(server->images[i].image);
		close(server->images[i].fd);
	}
	free(server->images);
	pthread_mutex_destroy(&server->lock);
	close(server->event_fd);
	free(server);
}

/* ---- images ------------------------------------------------------------------------- */

/* The first image whose id is not below this one. */
static size_t image_index(const struct criupy_server *server, uint64_t id)
{
	size_t low = 0, high = server->nr_images;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (server->images[middle].image->id < id)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

const struct served_image *server_find(const struct criupy_server *server, uint64_t id)
{
	size_t i = image_index(server, id);

	return i < server->nr_images && server->images[i].image->id == id ? &server->images[i] : NULL;
}

int server_check_pages(const struct served_image *served)
{
	struct stat now;

	if (served->upstream)
		return 0;
	if (fstat(served->fd, &now) < 0)
		return -errno;
	return now.st_size == served->size && now.st_mtim.tv_sec == served->written.tv_sec &&
		now.st_mtim.tv_nsec == served->written.tv_nsec ? 0 : -ESTALE;
}

int server_insert(struct criupy_server *server, const struct served_image *served)
{
	size_t i = image_index(server, served->image->id);

	if (server->nr_images == server->room_images) {
		size_t room = server->room_images ? 2 * server->room_images : 8;
		struct served_image *images = realloc(server->images, room * sizeof(*images));

		if (!images)
			return -ENOMEM;
		server->images = images;
		server->room_images = room;
	}
	memmove(server->images + i + 1, server->images + i, (server->nr_images - i) * sizeof(*server->images));
	server->images[i] = *served;
	server->nr_images++;
	return 0;
}

void server_forget(struct criupy_server *server, const struct criupy_upstream *upstream)
{
	size_t kept = 0;

	for (size_t i = 0; i < server->nr_images; i++)
		if (server->images[i].upstream != upstream)
			server->images[kept++] = server->images[i];
	server->nr_images = kept;
}

int criupy_server_add_image(struct criupy_server *server, struct criupy_image *image, int fd)
{
	struct served_image served = { .image = image, .fd = fd };
	struct stat pages;

	if (server->nr_connections)
		return -EBUSY;
	if (!image->has_data || server->config.receives)
		return -EINVAL;
	if (server_find(server, image->id))
		return -EEXIST;
	if (fstat(fd, &pages) < 0)
		return -errno;
	served.size = pages.st_size;
	served.written = pages.st_mtim;
	return server_insert(server, &served);
}

/* ---- connections ---------------------------------------------------------------------- */

void server_wake(const struct criupy_server *server)
{
	uint64_t one = 1;

	/* It can fail only when the counter is full, and then it is readable. */
	if (write(server->event_fd, &one, sizeof(one)) < 0)
		return;
}

static void *run(void *argument)
{
	struct connection *c = argument;
	struct criupy_server *server = c->server;

	pthread_setname_np(pthread_self(), "criupy-server");
	connection_serve(c);
	stream_end(c);
	pthread_mutex_lock(&server->lock);
	/* One that has its status lost nothing. */
	if (c->cut && !c->closing)
		c->counted.reason = CRIUPY_SERVED_CUT;
	close(c->fd);
	c->counted.ended_ns = server_now_ns();
	c->counted.ended = 1;
	c->account = c->counted;
	pthread_mutex_unlock(&server->lock);
	server_wake(server);
	return NULL;
}

static int start(struct connection *c)
{
	sigset_t all, before;
	int error;

	/* Signals are Python's; a send file to a closed socket raises one, too. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&c->thread, NULL, run, c);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -error;
}

int criupy_server_serve(struct criupy_server *server, int fd, struct criupy_transport *transport,
			uint64_t *serial)
{
	struct connection *c;
	int flags = fcntl(fd, F_GETFL), result;

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	c = calloc(1, sizeof(*c));
	if (!c)
		return -ENOMEM;
	c->server = server;
	c->fd = fd;
	c->transport = transport;
	c->counted.started_ns = server_now_ns();
	pthread_cond_init(&c->answered, NULL);
	pthread_mutex_lock(&server->lock);
	c->counted.serial = server->nr_connections;
	c->account = c->counted;
	result = start(c);
	if (result == 0) {
		*serial = server->nr_connections++;
		c->next = server->connections;
		server->connections = c;
	}
	pthread_mutex_unlock(&server->lock);
	if (result < 0) {
		pthread_cond_destroy(&c->answered);
		free(c);
	}
	return result;
}

int criupy_server_cut(struct criupy_server *server, uint64_t serial)
{
	int result = -ENOENT;

	pthread_mutex_lock(&server->lock);
	if (serial < server->nr_connections)
		result = 0;
	for (struct connection *c = server->connections; c; c = c->next)
		if (c->account.serial == serial)
			cut(c);
	pthread_mutex_unlock(&server->lock);
	return result;
}

int criupy_server_event_fd(const struct criupy_server *server)
{
	return server->event_fd;
}

int criupy_server_next_ended(struct criupy_server *server, struct criupy_served *served)
{
	struct connection **link, *c;

	pthread_mutex_lock(&server->lock);
	for (link = &server->connections; (c = *link); link = &c->next)
		if (c->account.ended)
			break;
	if (c) {
		*link = c->next;
		*served = c->account;
	}
	pthread_mutex_unlock(&server->lock);
	if (!c)
		return 0;
	connection_free(c);
	return 1;
}

int criupy_server_connections(struct criupy_server *server, struct criupy_served *served, int room)
{
	int nr = 0;

	pthread_mutex_lock(&server->lock);
	for (struct connection *c = server->connections; c && nr < room; c = c->next)
		if (!c->account.ended)
			served[nr++] = c->account;
	pthread_mutex_unlock(&server->lock);
	return nr;
}

/* ---- questions --------------------------------------------------------------------------- */

int criupy_server_next_question(struct criupy_server *server, struct criupy_question *question)
{
	struct connection *c;

	pthread_mutex_lock(&server->lock);
	for (c = server->connections; c; c = c->next)
		if (c->asking == ASKS && !c->cut)
			break;
	if (c) {
		c->asking = WAITS;
		*question = c->question;
	}
	pthread_mutex_unlock(&server->lock);
	return c ? 1 : 0;
}

static bool opens(const struct connection *c)
{
	uint32_t cmd = c->question.frame.cmd & CRIUPY_CMD_MASK;

	return cmd == CRIUPY_CMD_OPEN || cmd == CRIUPY_CMD_OPEN2;
}

int criupy_server_answer(struct criupy_server *server, uint64_t serial, int answer, int fd)
{
	struct connection *c;
	int result = -ESRCH;

	pthread_mutex_lock(&server->lock);
	for (c = server->connections; c; c = c->next)
		if (c->account.serial == serial)
			break;
	if (c && c->asking == WAITS && !c->cut)
		result = (fd >= 0) == (opens(c) && answer >= 0) ? 0 : -EINVAL;
	if (result == 0) {
		c->answer = answer;
		c->answer_fd = fd;
		c->asking = IS_ANSWERED;
		pthread_cond_signal(&c->answered);
	}
	pthread_mutex_unlock(&server->lock);
	return result;
}
