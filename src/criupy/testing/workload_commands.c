/* SPDX-License-Identifier: MIT */
/* What a worker does when the control file tells it to. */
#include "workload.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

struct slot *control_slot(struct control *control, uint32_t index)
{
	return (struct slot *)((char *)control + control->slots_offset + index * control->slot_size);
}

uint32_t *control_samples(struct control *control, uint32_t index)
{
	uint64_t length = (uint64_t)control->nr_samples * sizeof(uint32_t);

	return (uint32_t *)((char *)control + control->samples_offset + index * length);
}

static int failed(struct slot *slot, const char *what, int error)
{
	snprintf(slot->error, sizeof(slot->error), "%s: %s", what, strerror(error));
	return -error;
}

/* arg: first page, number of pages, destination address of the first page. */
static int move(struct slot *slot, struct segment *segment)
{
	size_t length = segment->nr_pages * PAGE;
	uint64_t to = slot->arg[2] + (segment->first - slot->arg[0]) * PAGE;

	if (mremap((void *)segment->address, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) == MAP_FAILED)
		return failed(slot, "mremap", errno);
	segment->address = to;
	return 0;
}

/* arg: first page, number of pages, generation. Every page of the range is populated afterwards. */
static void rewrite(const struct model *model, struct slot *slot, struct segment *segment)
{
	segment->generation = (uint32_t)slot->arg[2];
	segment->zero = false;
	segment->stride = 1;
	segment->origin = segment->first;
	for (uint64_t n = 0; n < segment->nr_pages; n++)
		pattern_write(model, segment->first + n, segment->generation,
			      (uint64_t *)(segment->address + n * PAGE));
	slot->result.value += segment->nr_pages;
}

/* Change what the model has of [first, first + nr): one system call a segment. */
static int change(struct worker *worker)
{
	struct slot *slot = worker->slot;
	struct model *model = worker->model;
	uint64_t first = slot->arg[0], end = first + slot->arg[1];
	int ret;

	model_change_begin(model);
	ret = model_cut(model, first, end);
	if (ret)
		failed(slot, "the range cannot be split further", -ret);
	for (uint32_t i = model_find(model, first); !ret && i < model->nr_segments; i++) {
		struct segment *segment = &model->segments[i];
		void *address = (void *)segment->address;
		size_t length = segment->nr_pages * PAGE;

		if (segment->first >= end)
			break;
		if (slot->command == COMMAND_MOVE) {
			ret = move(slot, segment);
		} else if (slot->command == COMMAND_WRITE) {
			rewrite(model, slot, segment);
		} else if (slot->command == COMMAND_DISCARD) {
			if (madvise(address, length, MADV_DONTNEED))
				ret = failed(slot, "madvise", errno);
			else
				segment->zero = true;
		} else if (munmap(address, length)) {
			ret = failed(slot, "munmap", errno);
		} else {
			model_remove(model, i--);
		}
	}
	model_change_end(model);
	return ret;
}

/* arg: first page, number of pages, pages per step, 0 for PROT_READ or 1 for PROT_READ | PROT_WRITE. */
static int protect(struct worker *worker)
{
	struct slot *slot = worker->slot;
	struct model *model = worker->model;
	uint64_t first = slot->arg[0], end = first + slot->arg[1], step = slot->arg[2];
	int prot = slot->arg[3] ? PROT_READ | PROT_WRITE : PROT_READ;
	int ret = 0;

	if (!step)
		return failed(slot, "protect needs a step", EINVAL);
	/* readers go on: nothing in the model changes */
	pthread_mutex_lock(&model->mutex);
	for (uint64_t page = first; !ret && page < end; page += 2 * step) {
		uint32_t index = model_find(model, page);
		const struct segment *segment = &model->segments[index];
		uint64_t nr = step < end - page ? step : end - page;

		if (index == model->nr_segments || segment->first > page)
			continue;
		if (nr > segment->first + segment->nr_pages - page)
			nr = segment->first + segment->nr_pages - page;
		if (mprotect((void *)segment_address(segment, page), nr * PAGE, prot))
			ret = failed(slot, "mprotect", errno);
		slot->result.value++;
	}
	pthread_mutex_unlock(&model->mutex);
	return ret;
}

/* Read pages by having the kernel copy them into a pipe. arg: first page, number of pages. */
static int read_by_syscall(struct worker *worker)
{
	struct slot *slot = worker->slot;
	struct model *model = worker->model;
	uint64_t end = slot->arg[1] ? slot->arg[0] + slot->arg[1] : model->nr_pages;
	uint64_t copy[WORDS];
	int ends[2], ret = 0;

	if (pipe2(ends, O_CLOEXEC))
		return failed(slot, "pipe", errno);
	for (uint64_t page = slot->arg[0]; page < end; page++) {
		uint32_t index = model_find(model, page);
		const struct segment *segment = &model->segments[index];
		ssize_t length;

		if (index == model->nr_segments || segment->first > page)
			continue;
		length = write(ends[1], (void *)segment_address(segment, page), PAGE);
		if (length < 0 && errno == EFAULT) {
			slot->result.checked++;
			slot->result.refused++;
			continue;
		}
		if (length != (ssize_t)PAGE || read(ends[0], copy, PAGE) != (ssize_t)PAGE) {
			ret = failed(slot, "a pipe did not take one whole page", length < 0 ? errno : EIO);
			break;
		}
		result_add(&slot->result, bytes_check(copy, model, segment, page), page, segment);
		atomic_fetch_add(&slot->heartbeat, 1);
	}
	close(ends[0]);
	close(ends[1]);
	return ret;
}

/* Count the pages that are present. arg: first page, number of pages. */
static int resident(struct worker *worker)
{
	struct slot *slot = worker->slot;
	struct model *model = worker->model;
	uint64_t end = slot->arg[1] ? slot->arg[0] + slot->arg[1] : model->nr_pages;
	unsigned char present[1024];
	uint64_t page = slot->arg[0];

	while (page < end) {
		uint32_t index = model_find(model, page);
		const struct segment *segment = &model->segments[index];
		uint64_t stop, nr;

		if (index == model->nr_segments)
			break;
		if (segment->first > page)
			page = segment->first;
		stop = segment->first + segment->nr_pages < end ? segment->first + segment->nr_pages : end;
		for (; page < stop; page += nr) {
			nr = stop - page < sizeof(present) ? stop - page : sizeof(present);
			if (mincore((void *)segment_address(segment, page), nr * PAGE, present))
				return failed(slot, "mincore", errno);
			for (uint64_t i = 0; i < nr; i++)
				slot->result.value += present[i] & 1;
		}
	}
	return 0;
}

static int wait_for(struct slot *slot, pid_t pid)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		return failed(slot, "waitpid", errno);
	slot->result.value = (uint64_t)status;
	return 0;
}

/* Fork a child that becomes the worker of a slot of its own. arg: index of the slot. */
static int fork_worker(struct worker *worker)
{
	struct slot *slot = worker->slot;
	uint32_t index = (uint32_t)slot->arg[0];
	struct control *control = worker->control;
	uint32_t first = control->nr_tasks * control->nr_threads;
	pid_t pid;

	if (index < first || index >= first + control->nr_children)
		return failed(slot, "no such child slot", EINVAL);
	pthread_mutex_lock(&worker->model->mutex);
	pid = fork();
	pthread_mutex_unlock(&worker->model->mutex);
	if (pid < 0)
		return failed(slot, "fork", errno);
	if (!pid) {
		worker->slot = control_slot(control, index);
		worker->samples = control_samples(control, index);
		worker_run(worker);
	}
	slot->result.value = (uint64_t)pid;
	return 0;
}

static void add_counts(struct result *to, const struct result *from)
{
	uint64_t none = UINT64_MAX;

	__atomic_fetch_add(&to->checked, from->checked, __ATOMIC_RELAXED);
	__atomic_fetch_add(&to->wrong, from->wrong, __ATOMIC_RELAXED);
	__atomic_fetch_add(&to->zero, from->zero, __ATOMIC_RELAXED);
	__atomic_fetch_add(&to->poisoned, from->poisoned, __ATOMIC_RELAXED);
	__atomic_fetch_add(&to->unmapped, from->unmapped, __ATOMIC_RELAXED);
	if (from->first_bad != UINT64_MAX &&
	    __atomic_compare_exchange_n(&to->first_bad, &none, from->first_bad, false, __ATOMIC_RELAXED,
					__ATOMIC_RELAXED))
		to->first_bad_address = from->first_bad_address;
}

/* Fork children that check all memory, add to this result and exit. arg: how many. */
static int fork_many(struct worker *worker)
{
	struct slot *slot = worker->slot;
	uint64_t wanted = slot->arg[0];
	pid_t *children;
	uint64_t nr = 0;
	int ret = 0;

	if (!wanted || wanted > 4096)
		return failed(slot, "between 1 and 4096 children", EINVAL);
	children = calloc(wanted, sizeof(*children));
	if (!children)
		return failed(slot, "calloc", ENOMEM);
	for (; nr < wanted && !ret; nr++) {
		pthread_mutex_lock(&worker->model->mutex);
		children[nr] = fork();
		pthread_mutex_unlock(&worker->model->mutex);
		if (children[nr] < 0) {
			ret = failed(slot, "fork", errno);
			break;
		}
		if (!children[nr]) {
			struct result found = { .first_bad = UINT64_MAX };

			check_range(worker->model, 0, 0, &found, &slot->heartbeat);
			add_counts(&slot->result, &found);
			_exit(0);
		}
	}
	for (uint64_t i = 0; i < nr; i++) {
		int status;

		if (waitpid(children[i], &status, 0) != children[i])
			ret = ret ? ret : failed(slot, "waitpid", errno);
		else if (!status)
			slot->result.value++;
	}
	free(children);
	return ret;
}

static int run(struct worker *worker)
{
	struct slot *slot = worker->slot;

	switch (slot->command) {
	case COMMAND_VERIFY:
		check_range(worker->model, slot->arg[0], slot->arg[1], &slot->result, &slot->heartbeat);
		return 0;
	case COMMAND_TOUCH:
		return touch_range(worker, slot->arg);
	case COMMAND_WRITE:
	case COMMAND_DISCARD:
	case COMMAND_MOVE:
	case COMMAND_UNMAP:
		return change(worker);
	case COMMAND_PROTECT:
		return protect(worker);
	case COMMAND_READ_BY_SYSCALL:
		return read_by_syscall(worker);
	case COMMAND_RESIDENT:
		return resident(worker);
	case COMMAND_FORK:
		return fork_worker(worker);
	case COMMAND_FORK_MANY:
		return fork_many(worker);
	case COMMAND_WAIT:
		return wait_for(slot, (pid_t)slot->arg[0]);
	case COMMAND_REAP_ZOMBIE:
		return wait_for(slot, worker->zombie);
	case COMMAND_NONE:
	case COMMAND_EXIT:
		return 0;
	default:
		return failed(slot, "unknown command", EINVAL);
	}
}

/* Obey the slot for ever. A process restored by CRIU goes on in here as if nothing had been. */
_Noreturn void worker_run(struct worker *worker)
{
	struct slot *slot = worker->slot;

	slot->pid = getpid();
	atomic_fetch_add(&worker->control->nr_ready, 1);
	for (;;) {
		uint32_t issued = atomic_load(&slot->issued);
		bool leave;

		if (issued == atomic_load(&slot->finished)) {
			atomic_fetch_add(&slot->heartbeat, 1);
			pause_us(500);
			continue;
		}
		memset(&slot->result, 0, sizeof(slot->result));
		slot->result.first_bad = UINT64_MAX;
		slot->result.started_ns = now_ns();
		slot->error[0] = 0;
		leave = slot->command == COMMAND_EXIT;
		slot->status = run(worker);
		slot->result.ended_ns = now_ns();
		atomic_store(&slot->finished, issued);
		if (leave)
			_exit((int)slot->arg[0]);
	}
}
