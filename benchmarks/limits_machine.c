/* What the machine can do: memory, faults, and waking a thread. */

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "limits.h"

#define NR_FAULTS ((size_t)4000)
#define NR_PINGS ((size_t)5000)
#define LARGE (256 * MIB)

/* ---- memory ---------------------------------------------------------------------- */

struct moving {
	uint8_t *to;
	const uint8_t *from;
	size_t length;
};

static void *move_all(void *argument)
{
	const struct moving *m = argument;

	memcpy(m->to, m->from, m->length);
	return NULL;
}

static void measure_memcpy(void)
{
	uint8_t *to = map_memory(LARGE), *from = map_memory(LARGE);

	memset(to, 1, LARGE);
	memset(from, 2, LARGE);
	for (size_t nr = 1; nr <= 2; nr++) {
		struct moving moving[2];
		pthread_t threads[2];
		uint64_t begin = now_ns();

		for (size_t i = 0; i < nr; i++) {
			moving[i] = (struct moving) { to + i * (LARGE / nr), from + i * (LARGE / nr), LARGE / nr };
			threads[i] = start_thread(move_all, &moving[i]);
		}
		for (size_t i = 0; i < nr; i++)
			join_thread(threads[i]);
		report(nr == 1 ? "memcpy" : "memcpy by two", "GB/s", (double)LARGE / (double)(now_ns() - begin));
	}
	munmap(to, LARGE);
	munmap(from, LARGE);
}

static void measure_bare_fault(void)
{
	volatile uint8_t *memory = map_memory(LARGE);
	uint64_t begin;

	warm_memory(LARGE);
	begin = now_ns();
	for (size_t at = 0; at < LARGE; at += PAGE)
		memory[at] = 1;
	report("bare fault", "ns", (double)(now_ns() - begin) / (double)(LARGE / PAGE));
	munmap((uint8_t *)memory, LARGE);
}

/* ---- a fault that another thread answers ----------------------------------------- */

struct handler {
	int uffd;
	int core;
	bool spins;
	const uint8_t *source;
};

static void *answer_faults(void *argument)
{
	const struct handler *h = argument;

	stay_on(h->core);
	for (size_t i = 0; i < NR_FAULTS;) {
		struct pollfd waiting = { .fd = h->uffd, .events = POLLIN };
		struct uffd_msg msg;
		uint64_t progress;

		if (!h->spins)
			CHECK(poll(&waiting, 1, -1) == 1);
		if (read(h->uffd, &msg, sizeof(msg)) != sizeof(msg)) {
			CHECK(errno == EAGAIN);
			continue;
		}
		CHECK(msg.event == UFFD_EVENT_PAGEFAULT);
		CHECK(!criupy_uffd_copy(h->uffd, msg.arg.pagefault.address & ~(PAGE - 1), h->source, PAGE, &progress));
		i++;
	}
	return NULL;
}

/* The median from the touch to the next instruction. */
static void measure_userfault(const char *key, int toucher_core, int handler_core, bool spins)
{
	volatile uint8_t *memory = map_memory(NR_FAULTS * PAGE);
	uint8_t *source = map_memory(PAGE);
	struct handler handler = { .core = handler_core, .spins = spins, .source = source };
	static uint64_t times[NR_FAULTS];
	pthread_t thread;

	memset(source, 1, PAGE);
	memset(times, 0, sizeof(times));
	handler.uffd = open_uffd((uint8_t *)memory, NR_FAULTS * PAGE, O_NONBLOCK);
	stay_on(toucher_core);
	thread = start_thread(answer_faults, &handler);
	for (size_t i = 0; i < NR_FAULTS; i++) {
		size_t page = i * 1009 % NR_FAULTS; /* each once, none beside the last */
		uint64_t begin = now_ns();

		CHECK(memory[page * PAGE] == 1);
		times[i] = now_ns() - begin;
	}
	join_thread(thread);
	stay_on(-1);
	report(key, "us", (double)middle(times, NR_FAULTS) / 1000);
	close(handler.uffd);
	munmap((uint8_t *)memory, NR_FAULTS * PAGE);
	munmap(source, PAGE);
}

/* ---- waking ------------------------------------------------------------------------ */

struct pinging {
	int to;
	int from;
	int core;
};

static void *answer_pings(void *argument)
{
	const struct pinging *p = argument;
	uint64_t one;

	stay_on(p->core);
	for (size_t i = 0; i < NR_PINGS; i++) {
		CHECK(read(p->from, &one, sizeof(one)) == sizeof(one));
		CHECK(write(p->to, &one, sizeof(one)) == sizeof(one));
	}
	return NULL;
}

/* From a write to an eventfd until the thread that sleeps in read() goes on: half the median there and back. */
static void measure_wake_up(const char *key, int core, int other_core)
{
	int there = eventfd(0, EFD_CLOEXEC), back = eventfd(0, EFD_CLOEXEC);
	struct pinging pinging = { .to = back, .from = there, .core = other_core };
	static uint64_t times[NR_PINGS];
	pthread_t thread;

	CHECK(there >= 0 && back >= 0);
	stay_on(core);
	thread = start_thread(answer_pings, &pinging);
	for (size_t i = 0; i < NR_PINGS; i++) {
		uint64_t one = 1, begin = now_ns();

		CHECK(write(there, &one, sizeof(one)) == sizeof(one));
		CHECK(read(back, &one, sizeof(one)) == sizeof(one));
		times[i] = now_ns() - begin;
	}
	join_thread(thread);
	stay_on(-1);
	report(key, "us", (double)middle(times, NR_PINGS) / 2000);
	close(there);
	close(back);
}

void measure_machine(void)
{
	measure_memcpy();
	measure_bare_fault();
	measure_userfault("userfault", -1, -1, false);
	measure_userfault("userfault, one core", 0, 0, false);
	measure_wake_up("wake-up", -1, -1);
	measure_wake_up("wake-up, one core", 0, 0);
	if (nr_cores() < 2)
		return;
	measure_userfault("userfault, two cores", 0, 1, false);
	measure_userfault("userfault, spinning", 0, 1, true);
	measure_wake_up("wake-up, two cores", 0, 1);
}
