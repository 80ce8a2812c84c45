/* SPDX-License-Identifier: MIT */
/*
 * A stand-in for `criu restore --lazy-pages`: memory that is mapped but empty,
 * handed over to a lazy-pages daemon the way CRIU does it.
 *
 * The first process connects before it forks the tree. Each task opens its own
 * userfaultfd, sends the pid it has in the images and then the descriptor, and
 * only then registers its memory. When all have, and the control file says so, the first one
 * sends the restore-finished word. A daemon that closed its end before that has vetoed
 * the restore: nobody runs.
 */
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

/* from the restore socket's protocol, criu/uffd.c */
#define RESTORE_FINISHED 0x52535446u

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

#define EXIT_VETOED 3
#define EXIT_ABANDONED 4

#define FEATURES_WITHOUT_FORK (UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMOVE)
#define FEATURES (FEATURES_WITHOUT_FORK | UFFD_FEATURE_EVENT_FORK)

int restorer_connect(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int socket_path, sock, ret = 0;

	/* Any path, though sun_path holds 107 bytes; criu goes to the directory
	 * for that, but our other paths are relative to where we are. */
	socket_path = open(path, O_PATH | O_CLOEXEC);
	if (socket_path < 0)
		return -errno;
	snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d", socket_path);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0 || connect(sock, (struct sockaddr *)&address, sizeof(address)))
		ret = -errno;
	close(socket_path);
	if (ret && sock >= 0)
		close(sock);
	return ret ? ret : sock;
}

static int uffd_open(int flags, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
	int ret;

	if (fd < 0)
		return -errno;
	if (ioctl(fd, UFFDIO_API, &api)) {
		ret = -errno;
		close(fd);
		return ret;
	}
	return fd;
}

/* Open the most capable userfaultfd that this user may have, and note which it is. */
static int uffd_open_best(struct control *control, const struct options *options)
{
	const uint64_t features[] = { FEATURES, FEATURES_WITHOUT_FORK };
	int ret = -EPERM;

	for (int user_only = options->user_mode_only; user_only < 2; user_only++) {
		for (int i = options->no_fork_event; i < 2; i++) {
			ret = uffd_open(user_only ? UFFD_USER_MODE_ONLY : 0, features[i]);
			if (ret < 0)
				continue;
			control->uffd_features = features[i];
			control->user_mode_only = (uint32_t)user_only;
			return ret;
		}
	}
	return ret;
}

static int send_all(int sock, const void *data, size_t length)
{
	ssize_t sent = send(sock, data, length, MSG_NOSIGNAL);

	if (sent < 0)
		return -errno;
	return sent == (ssize_t)length ? 0 : -EIO;
}

static int send_descriptor(int sock, int fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} space = { 0 };
	char byte = 0;
	struct iovec vector = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = space.bytes,
				  .msg_controllen = sizeof(space.bytes) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	if (sendmsg(sock, &message, MSG_NOSIGNAL) != 1)
		return -errno;
	return 0;
}

static int register_memory(int uffd, const struct model *model)
{
	for (uint32_t i = 0; i < model->nr_segments; i++) {
		const struct segment *segment = &model->segments[i];
		struct uffdio_register range = {
			.range = { .start = segment->address, .len = segment->nr_pages * PAGE },
			.mode = UFFDIO_REGISTER_MODE_MISSING,
		};

		if (ioctl(uffd, UFFDIO_REGISTER, &range))
			return -errno;
	}
	return 0;
}

/*
 * Wait until *value is at least `least`; the exit status of the task when the restore ends before. Where many
 * tasks wait, they look the less often the more they are and the longer it will take: a thousand that look all
 * the time leave no processor to what is tested.
 */
static int wait_until(struct control *control, _Atomic uint32_t *value, uint32_t least, uint32_t waiting)
{
	for (uint32_t now; (now = atomic_load(value)) < least;) {
		uint64_t turns = (uint64_t)(least - now) * waiting;

		if (atomic_load(&control->failed))
			return 1;
		if (atomic_load(&control->restorer_state) == RESTORER_VETOED)
			return EXIT_VETOED;
		if (atomic_load(&control->gate) == GATE_ABANDON)
			return EXIT_ABANDONED;
		pause_us(200 * (turns < 500 ? (uint32_t)turns : 500));
	}
	return 0;
}

/* Send one task's pid and descriptor, and after the last task the zombie's, in the order of the tasks. */
static int announce(int sock, int uffd, struct control *control, const struct model *model,
		    const struct options *options)
{
	int32_t pid = (int32_t)(options->pid_base + model->task);
	int32_t zombie = -(int32_t)(options->pid_base + options->tree);
	int ret = wait_until(control, &control->nr_announced, model->task, 1);

	if (ret)
		return ret;
	if (model->task >= options->announce)
		return wait_until(control, &control->nr_announced, UINT32_MAX, 1);
	ret = send_all(sock, &pid, sizeof(pid));
	if (!ret)
		ret = send_descriptor(sock, uffd);
	if (!ret && options->zombie && model->task + 1 == options->tree)
		ret = send_all(sock, &zombie, sizeof(zombie));
	if (!ret)
		atomic_fetch_add(&control->nr_announced, 1);
	return ret;
}

struct withheld {
	pthread_t thread;
	struct worker worker;
	uint64_t arg[8]; /* of touch_range */
	int ret;
};

static void *withheld_run(void *data)
{
	struct withheld *w = data;

	w->ret = touch_range(&w->worker, w->arg);
	return NULL;
}

/*
 * Touch pages of the first task at random while restore-finished is withheld: all memory is there to be
 * asked for, and a daemon transfers nothing in the background. Each of the task's threads-to-be has one here.
 */
static int touch_withheld(struct control *control, struct model *model, const struct options *options)
{
	struct withheld *all = calloc(options->threads, sizeof(*all));
	uint32_t started = 0;
	int ret = all ? 0 : -ENOMEM;

	for (; !ret && started < options->threads; started++) {
		struct withheld *w = &all[started];

		*w = (struct withheld){
			.worker = { control, control_slot(control, started), control_samples(control, started),
				    model, 0 },
			.arg = { ORDER_RANDOM, 0, 0, options->withheld, started + 1,
				 options->withheld_pause_us * 1000ull },
		};
		if (started) {
			w->worker.slot->result = (struct result){ .first_bad = UINT64_MAX };
			pause_us(options->withheld_pause_us / options->threads); /* not all at once, each time */
		}
		ret = -pthread_create(&w->thread, NULL, withheld_run, w);
		if (ret)
			break;
	}
	for (uint32_t i = 0; i < started; i++) {
		pthread_join(all[i].thread, NULL);
		if (!ret)
			ret = all[i].ret;
	}
	free(all);
	return ret;
}

static int finish(int sock, struct control *control, struct model *model, const struct options *options)
{
	const uint32_t word = RESTORE_FINISHED;
	int ret = wait_until(control, &control->nr_registered, options->tree, 1);

	if (!ret && options->withheld)
		ret = touch_withheld(control, model, options);
	if (ret)
		return ret;
	atomic_store(&control->restorer_state, RESTORER_REGISTERED);
	ret = wait_until(control, &control->gate, GATE_FINISH, 1);
	if (!ret && atomic_load(&control->gate) == GATE_ABANDON)
		ret = EXIT_ABANDONED;
	if (ret)
		return ret;
	return send_all(sock, &word, sizeof(word));
}

static void touch_early(const struct model *model, const struct options *options, struct result *result)
{
	for (uint64_t page = 0; page < options->early && page < model->segments[0].nr_pages; page++)
		result_add(result, page_check(model, &model->segments[0], page, true, NULL), page,
			   &model->segments[0]);
}

/*
 * Restore one task. Returns 0 when it may run, a positive exit status when the restore ended otherwise, or
 * -errno. Pages touched early are counted in the result of the task's first slot.
 */
int restorer_run(int sock, struct control *control, struct model *model, const struct options *options)
{
	struct slot *slot = control_slot(control, model->task * options->threads);
	int uffd = uffd_open_best(control, options);
	int ret;

	if (uffd < 0) {
		control_fail(control, "userfaultfd", -uffd);
		return uffd;
	}
	ret = announce(sock, uffd, control, model, options);
	if (!ret && options->register_delay_us)
		pause_us(options->register_delay_us);
	if (!ret)
		ret = register_memory(uffd, model);
	close(uffd);
	if (!ret) {
		slot->result = (struct result){ .first_bad = UINT64_MAX };
		touch_early(model, options, &slot->result);
		atomic_fetch_add(&control->nr_registered, 1);
	}
	if (!ret && !model->task) {
		ret = finish(sock, control, model, options);
		if (!ret)
			atomic_store(&control->restorer_state, RESTORER_FINISHED);
	} else if (!ret) {
		ret = wait_until(control, &control->restorer_state, RESTORER_FINISHED, options->tree);
		/* states beyond "finished" are the ways not to finish */
		if (!ret && atomic_load(&control->restorer_state) != RESTORER_FINISHED)
			ret = EXIT_ABANDONED;
	}
	close(sock);
	if (ret == -EPIPE || ret == -ECONNRESET) {
		atomic_store(&control->restorer_state, RESTORER_VETOED);
		return EXIT_VETOED;
	}
	if (ret == EXIT_ABANDONED && !model->task)
		atomic_store(&control->restorer_state, RESTORER_ABANDONED);
	return ret;
}
