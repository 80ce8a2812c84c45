/* SPDX-License-Identifier: MIT */
/*
 * criupy-workload: the process that is dumped and restored in tests, a
 * stand-in for `criu restore` that needs neither CRIU nor root (--restorer),
 * and the keeper that both run under (--keep).
 *
 * Everything is steered through a *control file*, a plain file mapped shared:
 * CRIU restores such a mapping by its path, so whoever holds the file can talk
 * to the process before the dump, during the restore and after it. The Python
 * side (workload_linux.py) reads and writes the same structures; `--layout`
 * prints their offsets so that a test keeps the two in step.
 */
#ifndef CRIUPY_WORKLOAD_H
#define CRIUPY_WORKLOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096ul
#define WORDS (PAGE / sizeof(uint64_t))

/* Where memory lives; below 2^39 so that small address spaces hold it too. */
#define AREA_BASE 0x1000000000ul
#define AREA_GAP 0x100000ul
#define RESERVE_BASE 0x3000000000ul
#define RESERVE_PAGES 16

#define CONTROL_MAGIC 0x59575243u /* "CRWY" in a hex dump */
#define CONTROL_VERSION 1u
#define CONTROL_SIZE 4096u
#define ERROR_SIZE 160
#define HISTOGRAM_SIZE 256
#define STALL_NS 2000u

enum gate { GATE_WAIT, GATE_FINISH, GATE_ABANDON };
enum restorer_state { RESTORER_NONE, RESTORER_CONNECTED, RESTORER_REGISTERED, RESTORER_FINISHED, RESTORER_VETOED,
		      RESTORER_ABANDONED };

enum command {
	COMMAND_NONE,
	COMMAND_VERIFY,
	COMMAND_TOUCH,
	COMMAND_WRITE,
	COMMAND_READ_BY_SYSCALL,
	COMMAND_RESIDENT,
	COMMAND_DISCARD,
	COMMAND_MOVE,
	COMMAND_UNMAP,
	COMMAND_PROTECT,
	COMMAND_FORK,
	COMMAND_FORK_MANY,
	COMMAND_WAIT,
	COMMAND_REAP_ZOMBIE,
	COMMAND_EXIT,
	NR_COMMANDS
};

enum order { ORDER_SEQUENTIAL, ORDER_RANDOM, ORDER_HOT };

#define TOUCH_WHOLE_PAGE 1u /* check every byte, not the first word only */
#define TOUCH_EVERY_PAGE 2u /* also pages that were never populated */
#define TOUCH_UNTIL_STOPPED 4u
#define TOUCH_SAMPLE_FAULTS 8u /* keep samples of stalls with a page fault only, not of those by the scheduler */

/* What a command found; written by the worker, read by Python. */
struct result {
	uint64_t checked;   /* pages looked at */
	uint64_t wrong;     /* neither the expected bytes nor all zero */
	uint64_t zero;      /* all zero where data was expected */
	uint64_t poisoned;  /* SIGBUS */
	uint64_t unmapped;  /* SIGSEGV */
	uint64_t refused;   /* EFAULT from a system call */
	uint64_t first_bad; /* original page index, UINT64_MAX when none */
	uint64_t first_bad_address;
	uint64_t value; /* command specific: pid, status, pages */
	uint64_t touches;
	uint64_t total_ns;
	uint64_t stalls; /* touches above STALL_NS, and their sum */
	uint64_t stall_ns;
	uint64_t max_ns;
	uint64_t started_ns; /* CLOCK_MONOTONIC */
	uint64_t ended_ns;
};

/* One worker: a thread of a task, or a forked child. */
struct slot {
	_Atomic uint32_t issued;   /* written last by Python */
	_Atomic uint32_t finished; /* written last by the worker */
	_Atomic uint32_t stop;
	uint32_t command;
	uint64_t arg[8];
	int32_t status; /* 0 or -errno */
	int32_t pid;
	_Atomic uint64_t heartbeat;
	struct result result;
	uint64_t nr_samples; /* of the last touch command, like the histogram */
	uint64_t histogram[HISTOGRAM_SIZE];
	char error[ERROR_SIZE];
};

struct control {
	uint32_t magic;
	uint32_t version;
	uint32_t nr_tasks;
	uint32_t nr_threads;
	uint32_t nr_children;
	uint32_t nr_samples; /* per slot */
	uint64_t slots_offset;
	uint64_t slot_size;
	uint64_t samples_offset; /* u32 nanoseconds, nr_samples per slot */
	uint64_t file_size;
	uint64_t uffd_features;
	uint32_t user_mode_only;
	_Atomic uint32_t nr_ready; /* workers in their command loop */
	_Atomic uint32_t nr_announced;
	_Atomic uint32_t nr_registered;
	_Atomic uint32_t gate; /* written by Python */
	_Atomic uint32_t restorer_state;
	_Atomic uint32_t failed;
	char error[ERROR_SIZE];
};

struct options {
	const char *control;
	const char *restorer;
	uint64_t size;
	uint64_t seed;
	uint64_t reserve;
	uint32_t areas;
	uint32_t stride;
	bool adjacent;
	uint32_t tree;
	uint32_t threads;
	uint32_t children;
	uint32_t samples;
	bool zombie;
	/* the stand-in only */
	uint32_t pid_base;
	uint32_t announce;
	uint32_t register_delay_us;
	uint32_t early;
	bool user_mode_only;
	bool no_fork_event;
	uint32_t withheld;
	uint32_t withheld_pause_us;
};

/*
 * The model: which pages there should be, where, and holding what. Segments
 * are in order of their original page index, which never changes, while their
 * address does; an index in no segment was unmapped.
 */
#define MAX_SEGMENTS 1024

struct segment {
	uint64_t address;
	uint64_t first;
	uint64_t nr_pages;
	uint64_t origin; /* index that `stride` counts from */
	uint64_t stride; /* every stride-th page was populated */
	uint32_t generation;
	bool zero; /* discarded: all pages read as zero */
};

struct model {
	uint64_t seed;
	uint64_t nr_pages; /* indices given out, the reserve's included */
	uint32_t task;
	uint32_t nr_segments;
	pthread_mutex_t mutex;	  /* one change at a time */
	_Atomic uint32_t version; /* odd while it changes, so that readers need no lock */
	struct segment segments[MAX_SEGMENTS];
};

struct worker {
	struct control *control;
	struct slot *slot;
	uint32_t *samples;
	struct model *model;
	pid_t zombie;
};

/* workload_memory.c */
uint64_t pattern_first(const struct model *model, uint64_t page, uint32_t generation);
void pattern_write(const struct model *model, uint64_t page, uint32_t generation, uint64_t *words);
uint64_t segment_address(const struct segment *segment, uint64_t page);
bool segment_holds_data(const struct segment *segment, uint64_t page);
void model_init(struct model *model, const struct options *options, uint32_t task);
int model_map(const struct model *model);
void model_fill(const struct model *model);
void model_change_begin(struct model *model);
void model_change_end(struct model *model);
uint32_t model_read_begin(const struct model *model);
bool model_read_valid(const struct model *model, uint32_t version);
uint32_t model_find(const struct model *model, uint64_t page);
int model_cut(struct model *model, uint64_t first, uint64_t end);
void model_remove(struct model *model, uint32_t index);

/* workload_check.c */
enum check { CHECK_GOOD, CHECK_WRONG, CHECK_ZERO, CHECK_POISONED, CHECK_UNMAPPED };
int faults_catch(void);
enum check page_check(const struct model *model, const struct segment *segment, uint64_t page, bool whole,
		      uint64_t *ns);
enum check bytes_check(const void *bytes, const struct model *model, const struct segment *segment, uint64_t page);
void result_add(struct result *result, enum check check, uint64_t page, const struct segment *segment);
void check_range(struct model *model, uint64_t first, uint64_t nr, struct result *result,
		 _Atomic uint64_t *heartbeat);
int touch_range(struct worker *worker, const uint64_t arg[8]);

/* workload_commands.c */
_Noreturn void worker_run(struct worker *worker);
struct slot *control_slot(struct control *control, uint32_t index);
uint32_t *control_samples(struct control *control, uint32_t index);

/* workload_restorer.c */
int restorer_connect(const char *path);
int restorer_run(int sock, struct control *control, struct model *model, const struct options *options);

/* workload_keeper.c */
int keeper_main(int argc, char **argv);

/* workload.c */
uint64_t now_ns(void);
void pause_us(uint32_t microseconds);
void control_fail(struct control *control, const char *what, int error);

#endif
