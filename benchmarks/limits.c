/* Micro-benchmarks of the native core and of the machine; benchmarks/limits.py
 * is the program to run.
 *
 * limits measure                                       one round of all
 * limits fetch PORT FRAME ID ADDRESS PAGES EACH WINDOW GAP
 *                                                      a client that discards
 * limits serve                                         the far end of a link
 * limits round-trip PORT COUNT, limits stream PORT BYTES  ... and the near one */

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include "limits.h"

uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void report(const char *key, const char *unit, double value)
{
	printf("%s\t%s\t%.6g\n", key, unit, value);
	fflush(stdout);
}

void report_sized(const char *key, size_t size, const char *unit, double value)
{
	char full[64];

	snprintf(full, sizeof(full), "%s %zu", key, size);
	report(full, unit, value);
}

uint64_t random_next(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed >> 11;
}

static int compare_times(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

uint64_t middle(uint64_t *times, size_t nr)
{
	qsort(times, nr, sizeof(*times), compare_times);
	return times[nr / 2];
}

static cpu_set_t allowed;

int nr_cores(void)
{
	return CPU_COUNT(&allowed);
}

void stay_on(int core)
{
	cpu_set_t set;

	if (core < 0) {
		CHECK(!sched_setaffinity(0, sizeof(allowed), &allowed));
		return;
	}
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &allowed) || core--)
			continue;
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
		CHECK(!sched_setaffinity(0, sizeof(set), &set));
		return;
	}
}

uint8_t *map_memory(size_t length)
{
	uint8_t *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	/* A kernel without huge pages has nothing to turn off. */
	CHECK(!madvise(memory, length, MADV_NOHUGEPAGE) || errno == EINVAL);
	return memory;
}

void warm_memory(size_t length)
{
	uint8_t *memory = map_memory(length);

	memset(memory, 1, length);
	CHECK(!munmap(memory, length));
}

int open_uffd(uint8_t *memory, size_t length, int flags)
{
	int uffd = criupy_uffd_open(O_CLOEXEC | flags);
	uint64_t offered;

	CHECK(uffd >= 0);
	CHECK(!criupy_uffd_api(uffd, 0, &offered));
	CHECK(!criupy_uffd_register(uffd, (uintptr_t)memory, length, &offered));
	return uffd;
}

pthread_t start_thread(void *(*run)(void *), void *argument)
{
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, run, argument));
	return thread;
}

void join_thread(pthread_t thread)
{
	CHECK(!pthread_join(thread, NULL));
}

int main(int argc, char **argv)
{
	CHECK(!sched_getaffinity(0, sizeof(allowed), &allowed));
	if (argc == 2 && !strcmp(argv[1], "measure")) {
		measure_core();
		measure_machine();
		measure_net();
		return 0;
	}
	if (argc == 10 && !strcmp(argv[1], "fetch"))
		return fetch(argv + 2);
	if (argc == 2 && !strcmp(argv[1], "serve"))
		return serve();
	if (argc == 4 && !strcmp(argv[1], "round-trip"))
		return round_trip(argv + 2);
	if (argc == 4 && !strcmp(argv[1], "stream"))
		return stream(argv + 2);
	fprintf(stderr, "limits: see the top of limits.c for what it is given\n");
	return 2;
}
