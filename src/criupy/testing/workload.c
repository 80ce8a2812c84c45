/* SPDX-License-Identifier: MIT */
/* Start: options, the control file, the tree of tasks with their threads. */
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ZOMBIE_STATUS 42

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void pause_us(uint32_t microseconds)
{
	struct timespec time = { .tv_sec = microseconds / 1000000, .tv_nsec = microseconds % 1000000 * 1000L };

	nanosleep(&time, NULL);
}

void control_fail(struct control *control, const char *what, int error)
{
	uint32_t first = 0;

	if (atomic_compare_exchange_strong(&control->failed, &first, 1))
		snprintf(control->error, sizeof(control->error), "%s: %s", what, strerror(error));
}

static int print_layout(void)
{
#define FIELD(type, name) printf(#type "." #name " %zu\n", offsetof(struct type, name))
	printf("size.control %zu\nsize.slot %zu\nsize.result %zu\n", sizeof(struct control), sizeof(struct slot),
	       sizeof(struct result));
	printf("constant.error_size %d\nconstant.histogram_size %d\nconstant.nr_commands %d\n", ERROR_SIZE,
	       HISTOGRAM_SIZE, NR_COMMANDS);
	printf("constant.area_base %lu\nconstant.area_gap %lu\nconstant.reserve_base %lu\n"
	       "constant.reserve_pages %d\nconstant.stall_ns %u\nconstant.zombie_status %d\n",
	       AREA_BASE, AREA_GAP, RESERVE_BASE, RESERVE_PAGES, STALL_NS, ZOMBIE_STATUS);
	FIELD(control, magic);
	FIELD(control, version);
	FIELD(control, nr_tasks);
	FIELD(control, nr_threads);
	FIELD(control, nr_children);
	FIELD(control, nr_samples);
	FIELD(control, slots_offset);
	FIELD(control, slot_size);
	FIELD(control, samples_offset);
	FIELD(control, file_size);
	FIELD(control, uffd_features);
	FIELD(control, user_mode_only);
	FIELD(control, nr_ready);
	FIELD(control, nr_announced);
	FIELD(control, nr_registered);
	FIELD(control, gate);
	FIELD(control, restorer_state);
	FIELD(control, failed);
	FIELD(control, error);
	FIELD(slot, issued);
	FIELD(slot, finished);
	FIELD(slot, stop);
	FIELD(slot, command);
	FIELD(slot, arg);
	FIELD(slot, status);
	FIELD(slot, pid);
	FIELD(slot, heartbeat);
	FIELD(slot, result);
	FIELD(slot, nr_samples);
	FIELD(slot, histogram);
	FIELD(slot, error);
	FIELD(result, checked);
	FIELD(result, wrong);
	FIELD(result, zero);
	FIELD(result, poisoned);
	FIELD(result, unmapped);
	FIELD(result, refused);
	FIELD(result, first_bad);
	FIELD(result, first_bad_address);
	FIELD(result, value);
	FIELD(result, touches);
	FIELD(result, total_ns);
	FIELD(result, stalls);
	FIELD(result, stall_ns);
	FIELD(result, max_ns);
	FIELD(result, started_ns);
	FIELD(result, ended_ns);
#undef FIELD
	return 0;
}

/* Make the control file and map it shared; its descriptor is closed again, CRIU finds the file by its path. */
static struct control *control_create(const struct options *options)
{
	uint64_t nr_slots = (uint64_t)options->tree * options->threads + options->children;
	uint64_t slot_size = (sizeof(struct slot) + 63) & ~63ull;
	uint64_t samples_offset = (CONTROL_SIZE + nr_slots * slot_size + PAGE - 1) & ~(PAGE - 1);
	uint64_t size = samples_offset + nr_slots * options->samples * sizeof(uint32_t);
	struct control *control;
	int fd;

	size = (size + PAGE - 1) & ~(PAGE - 1);
	fd = open(options->control, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		return NULL;
	if (ftruncate(fd, 0) || ftruncate(fd, (off_t)size)) {
		close(fd);
		return NULL;
	}
	control = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (control == MAP_FAILED)
		return NULL;
	control->version = CONTROL_VERSION;
	control->nr_tasks = options->tree;
	control->nr_threads = options->threads;
	control->nr_children = options->children;
	control->nr_samples = options->samples;
	control->slots_offset = CONTROL_SIZE;
	control->slot_size = slot_size;
	control->samples_offset = samples_offset;
	control->file_size = size;
	/* last, because Python waits for it */
	__atomic_store_n(&control->magic, CONTROL_MAGIC, __ATOMIC_RELEASE);
	return control;
}

static struct worker *worker_new(struct control *control, struct model *model, uint32_t index)
{
	struct worker *worker = calloc(1, sizeof(*worker));

	if (!worker)
		return NULL;
	worker->control = control;
	worker->model = model;
	worker->slot = control_slot(control, index);
	worker->samples = control_samples(control, index);
	return worker;
}

static void *thread_main(void *argument)
{
	worker_run(argument);
}

/* Be task number `task`: take up memory, filled or lazy, start the threads, obey. */
static _Noreturn void task_main(struct control *control, const struct options *options, uint32_t task, int sock)
{
	struct model *model = calloc(1, sizeof(*model));
	struct worker *worker = NULL;
	pthread_t thread;
	pid_t zombie = -1;
	int ret = model ? 0 : -ENOMEM;

	if (ret)
		goto fail;
	/* before anything is registered: the fork would wait for a daemon to read of it */
	if (options->zombie && !task) {
		zombie = fork();
		if (!zombie)
			_exit(ZOMBIE_STATUS);
		if (zombie < 0) {
			ret = -errno;
			goto fail;
		}
	}
	/* CRIU leaves locked memory out of what it moves lazily. So a migration
	 * that fails costs pages of the areas, where they are looked for, and not
	 * the stack that looking needs. A restorer's own memory is never lazy. */
	if (!options->restorer && mlockall(MCL_CURRENT | MCL_ONFAULT)) {
		ret = -errno;
		goto fail;
	}
	model_init(model, options, task);
	ret = model_map(model);
	if (ret)
		goto fail;
	control_slot(control, task * options->threads)->pid = getpid();
	if (options->restorer) {
		ret = restorer_run(sock, control, model, options);
		if (ret > 0)
			_exit(ret);
		if (ret)
			goto fail;
	} else {
		model_fill(model);
	}
	for (uint32_t i = options->threads; i-- > 0;) {
		worker = worker_new(control, model, task * options->threads + i);
		if (!worker) {
			ret = -ENOMEM;
			goto fail;
		}
		worker->zombie = zombie;
		if (i) {
			ret = -pthread_create(&thread, NULL, thread_main, worker);
			if (ret)
				goto fail;
		}
	}
	worker_run(worker);
fail:
	control_fail(control, "cannot set up the memory of a task", -ret);
	_exit(1);
}

/* Fork the tree of tasks, a binary one: the children of k are 2k + 1 and 2k + 2. */
static _Noreturn void tree_run(struct control *control, const struct options *options, int sock)
{
	uint32_t task = 0;

	for (uint32_t child = 1; child <= 2 * task + 2 && child < options->tree; child++) {
		pid_t pid = fork();

		if (pid < 0) {
			control_fail(control, "fork", errno);
			_exit(1);
		}
		if (!pid) {
			task = child;
			child = 2 * task; /* and one more by the loop */
		}
	}
	task_main(control, options, task, sock);
}

enum { OPTION_FIRST = 1000, OPTION_ADJACENT, OPTION_FRAGMENTED, OPTION_ZOMBIE, OPTION_USER_MODE_ONLY,
       OPTION_NO_FORK_EVENT, OPTION_LAYOUT, OPTION_WITHHELD, OPTION_WITHHELD_PAUSE };

static const struct option long_options[] = {
	{ "control", required_argument, NULL, 'c' },
	{ "size", required_argument, NULL, 's' },
	{ "seed", required_argument, NULL, 'S' },
	{ "areas", required_argument, NULL, 'a' },
	{ "reserve", required_argument, NULL, 'r' },
	{ "tree", required_argument, NULL, 't' },
	{ "threads", required_argument, NULL, 'T' },
	{ "children", required_argument, NULL, 'C' },
	{ "samples", required_argument, NULL, 'n' },
	{ "restorer", required_argument, NULL, 'R' },
	{ "pid-base", required_argument, NULL, 'p' },
	{ "announce", required_argument, NULL, 'A' },
	{ "register-delay-us", required_argument, NULL, 'd' },
	{ "early", required_argument, NULL, 'e' },
	{ "adjacent", no_argument, NULL, OPTION_ADJACENT },
	{ "fragmented", no_argument, NULL, OPTION_FRAGMENTED },
	{ "zombie", no_argument, NULL, OPTION_ZOMBIE },
	{ "user-mode-only", no_argument, NULL, OPTION_USER_MODE_ONLY },
	{ "no-fork-event", no_argument, NULL, OPTION_NO_FORK_EVENT },
	{ "withheld", required_argument, NULL, OPTION_WITHHELD },
	{ "withheld-pause-us", required_argument, NULL, OPTION_WITHHELD_PAUSE },
	{ "layout", no_argument, NULL, OPTION_LAYOUT },
	{ 0 },
};

static int usage(const char *what)
{
	fprintf(stderr, "criupy-workload: %s; it is started by criupy.testing, which knows its options\n", what);
	return 2;
}

int main(int argc, char **argv)
{
	struct options options = { .size = 1 << 20, .seed = 1, .areas = 1, .stride = 1, .tree = 1, .threads = 1,
				   .pid_base = 100, .announce = UINT32_MAX };
	struct control *control;
	int option, sock = -1;

	if (argc > 1 && !strcmp(argv[1], "--keep"))
		return keeper_main(argc - 1, argv + 1);
	while ((option = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
		uint64_t number = optarg ? strtoull(optarg, NULL, 0) : 0;

		switch (option) {
		case 'c': options.control = optarg; break;
		case 'R': options.restorer = optarg; break;
		case 's': options.size = number; break;
		case 'S': options.seed = number; break;
		case 'r': options.reserve = number; break;
		case 'a': options.areas = (uint32_t)number; break;
		case 't': options.tree = (uint32_t)number; break;
		case 'T': options.threads = (uint32_t)number; break;
		case 'C': options.children = (uint32_t)number; break;
		case 'n': options.samples = (uint32_t)number; break;
		case 'p': options.pid_base = (uint32_t)number; break;
		case 'A': options.announce = (uint32_t)number; break;
		case 'd': options.register_delay_us = (uint32_t)number; break;
		case 'e': options.early = (uint32_t)number; break;
		case OPTION_ADJACENT: options.adjacent = true; break;
		case OPTION_FRAGMENTED: options.stride = 2; break;
		case OPTION_ZOMBIE: options.zombie = true; break;
		case OPTION_USER_MODE_ONLY: options.user_mode_only = true; break;
		case OPTION_NO_FORK_EVENT: options.no_fork_event = true; break;
		case OPTION_WITHHELD: options.withheld = (uint32_t)number; break;
		case OPTION_WITHHELD_PAUSE: options.withheld_pause_us = (uint32_t)number; break;
		case OPTION_LAYOUT: return print_layout();
		default: return usage("unknown option");
		}
	}
	if (!options.control)
		return usage("--control FILE is needed");
	if (!options.areas || options.areas >= MAX_SEGMENTS / 2 || !options.tree || !options.threads ||
	    options.size % (options.areas * PAGE) || !options.size || options.reserve % (RESERVE_PAGES * PAGE))
		return usage("sizes must be whole pages in every area, and nothing zero");
	if (faults_catch())
		return usage("cannot catch SIGBUS");
	control = control_create(&options);
	if (!control) {
		perror(options.control);
		return 1;
	}
	if (options.restorer) {
		sock = restorer_connect(options.restorer);
		if (sock < 0) {
			control_fail(control, options.restorer, -sock);
			return 1;
		}
		atomic_store(&control->restorer_state, RESTORER_CONNECTED);
	}
	tree_run(control, &options, sock);
}
