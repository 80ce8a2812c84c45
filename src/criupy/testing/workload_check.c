/* SPDX-License-Identifier: MIT */
/* Looking at pages: every byte, or a timed touch; surviving SIGBUS and SIGSEGV. */
#include "workload.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>

/* Where the current thread goes on after a fault; a signal handler has no other way to know. */
static _Thread_local sigjmp_buf *guard;

static void on_fault(int number, siginfo_t *info, void *context)
{
	sigjmp_buf *target = guard;

	(void)info;
	(void)context;
	if (!target) {
		signal(number, SIG_DFL);
		raise(number);
		return;
	}
	guard = NULL;
	siglongjmp(*target, number);
}

int faults_catch(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER };

	if (sigaction(SIGBUS, &action, NULL) || sigaction(SIGSEGV, &action, NULL))
		return -errno;
	return 0;
}

/* Touch the page's first word, timed into *ns when given, then check it, or every byte of the page. */
enum check page_check(const struct model *model, const struct segment *segment, uint64_t page, bool whole, uint64_t *ns)
{
	const volatile uint64_t *words = (const uint64_t *)segment_address(segment, page);
	sigjmp_buf here;
	uint64_t word, expected, start;
	enum check check;
	int number;

	start = ns ? now_ns() : 0;
	number = sigsetjmp(here, 0);
	if (number && ns)
		*ns = now_ns() - start;
	if (number)
		return number == SIGBUS ? CHECK_POISONED : CHECK_UNMAPPED;
	guard = &here;
	word = words[0];
	if (ns)
		*ns = now_ns() - start;
	if (whole) {
		check = bytes_check((const void *)words, model, segment, page);
	} else {
		expected = segment_holds_data(segment, page) ? pattern_first(model, page, segment->generation) : 0;
		check = word == expected ? CHECK_GOOD : word ? CHECK_WRONG : CHECK_ZERO;
	}
	guard = NULL;
	return check;
}

void result_add(struct result *result, enum check check, uint64_t page, const struct segment *segment)
{
	result->checked++;
	switch (check) {
	case CHECK_GOOD:
		return;
	case CHECK_WRONG:
		result->wrong++;
		break;
	case CHECK_ZERO:
		result->zero++;
		break;
	case CHECK_POISONED:
		result->poisoned++;
		break;
	case CHECK_UNMAPPED:
		result->unmapped++;
		break;
	}
	if (result->first_bad == UINT64_MAX) {
		result->first_bad = page;
		result->first_bad_address = segment_address(segment, page);
	}
}

/*
 * Look at one page if the model has it: false when it does not. Findings made while the model changed are
 * thrown away and made again.
 */
static bool look(struct model *model, uint64_t page, uint32_t flags, struct result *result, uint64_t *ns)
{
	for (;;) {
		uint32_t version = model_read_begin(model);
		uint32_t index = model_find(model, page);
		struct segment segment;
		enum check check;
		bool mapped, wanted;

		mapped = index < model->nr_segments;
		if (mapped)
			segment = model->segments[index];
		if (!model_read_valid(model, version))
			continue;
		if (!mapped || page < segment.first)
			return false;
		wanted = (flags & TOUCH_EVERY_PAGE) || segment_holds_data(&segment, page);
		/* pages of the reserve were never touched: look only beside populated ones */
		if (segment.stride > 2 && (page - segment.origin) % segment.stride > 1)
			wanted = false;
		if (!wanted)
			return false;
		check = page_check(model, &segment, page, flags & TOUCH_WHOLE_PAGE, ns);
		if (!model_read_valid(model, version))
			continue;
		result_add(result, check, page, &segment);
		return true;
	}
}

void check_range(struct model *model, uint64_t first, uint64_t nr, struct result *result, _Atomic uint64_t *heartbeat)
{
	uint64_t end = nr ? first + nr : model->nr_pages;

	for (uint64_t page = first; page < end; page++) {
		look(model, page, TOUCH_WHOLE_PAGE | TOUCH_EVERY_PAGE, result, NULL);
		if (heartbeat)
			atomic_fetch_add_explicit(heartbeat, 1, memory_order_relaxed);
	}
}

/* A bijection on [0, 2^bits): every step can be undone, so every value comes exactly once. */
static uint64_t shuffle(uint64_t x, uint32_t bits, uint64_t seed)
{
	uint64_t mask = bits ? ~0ull >> (64 - bits) : 0;
	uint32_t half = bits / 2 ? bits / 2 : 1;

	x = (x + seed) & mask;
	for (uint32_t round = 0; round < 3; round++) {
		x = x * 0x9e3779b97f4a7c15ull & mask;
		x ^= x >> half;
		x = (x + (seed >> 16)) & mask;
	}
	return x;
}

static uint64_t scatter(uint64_t x)
{
	x *= 0x9e3779b97f4a7c15ull;
	x ^= x >> 32;
	x *= 0xd6e8feb86659fd93ull;
	return x ^ x >> 32;
}

/* Nine of ten in the tenth of the range that begins in its middle, the others anywhere. */
static uint64_t hot_place(uint64_t chance, uint64_t nr)
{
	uint64_t tenth = nr / 10 ? nr / 10 : 1;

	return chance % 10 ? nr / 2 + chance / 10 % tenth : chance / 10 % nr;
}

static uint32_t bucket(uint64_t ns)
{
	uint32_t log2 = 63 - (uint32_t)__builtin_clzll(ns | 1);

	/* four buckets an octave; below 4 ns each value has its own */
	return log2 < 2 ? (uint32_t)ns : log2 * 4 + (ns >> (log2 - 2) & 3);
}

/* Page faults of this thread so far. One that waits for a userfaultfd counts as major or minor, as the kernel goes. */
static uint64_t count_faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_THREAD, &usage);
	return (uint64_t)usage.ru_minflt + (uint64_t)usage.ru_majflt;
}

/* `faults`, where given, has the faults before this touch: its time is a sample only if there are more now. */
static void record(struct worker *worker, uint64_t ns, uint64_t *faults)
{
	struct result *result = &worker->slot->result;

	result->touches++;
	result->total_ns += ns;
	if (ns > STALL_NS) {
		result->stalls++;
		result->stall_ns += ns;
	}
	if (ns > result->max_ns)
		result->max_ns = ns;
	worker->slot->histogram[bucket(ns)]++;
	if (faults) {
		uint64_t before = *faults;

		if (ns <= STALL_NS)
			return;
		*faults = count_faults();
		if (*faults == before)
			return;
	}
	if (worker->slot->nr_samples < worker->control->nr_samples)
		worker->samples[worker->slot->nr_samples++] = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

/*
 * Touch pages and time each touch. arg: order, first page, number of pages (0: all), touches (0: each
 * page once), seed, pause in ns, flags, longest duration in ns (0: no limit).
 */
int touch_range(struct worker *worker, const uint64_t arg[8])
{
	struct slot *slot = worker->slot;
	uint64_t first = arg[1], nr = arg[2] ? arg[2] : worker->model->nr_pages - arg[1];
	uint64_t flags = arg[6], start = now_ns();
	uint64_t touches = arg[3] ? arg[3] : nr;
	uint64_t faults = count_faults();
	uint32_t bits = 0;

	if (arg[0] > ORDER_HOT || first > worker->model->nr_pages || !nr)
		return -EINVAL;
	while (bits < 63 && 1ull << bits < nr)
		bits++;
	memset(slot->histogram, 0, sizeof(slot->histogram));
	slot->nr_samples = 0;
	for (uint64_t turn = 0, made = 0; made < touches || (flags & TOUCH_UNTIL_STOPPED); turn++) {
		uint64_t place = turn, ns = 0;

		if (atomic_load_explicit(&slot->stop, memory_order_relaxed))
			break;
		if (arg[7] && now_ns() - start > arg[7])
			break;
		if (arg[0] == ORDER_RANDOM) {
			/* another order each time round; places beyond the range are skipped */
			place = shuffle(turn & ((1ull << bits) - 1), bits, scatter(arg[4] + (turn >> bits)));
			if (place >= nr)
				continue;
		} else if (arg[0] == ORDER_HOT) {
			place = hot_place(scatter(arg[4] + turn), nr);
		} else {
			place = turn % nr;
		}
		made++;
		if (!look(worker->model, first + place, (uint32_t)flags, &slot->result, &ns))
			continue;
		record(worker, ns, flags & TOUCH_SAMPLE_FAULTS ? &faults : NULL);
		atomic_fetch_add_explicit(&slot->heartbeat, 1, memory_order_relaxed);
		if (arg[5])
			pause_us((uint32_t)(arg[5] / 1000));
	}
	return 0;
}
