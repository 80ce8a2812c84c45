/* What the files of the micro-benchmarks share. benchmarks/limits.py compiles
 * them with the core's sources, and reads what they print. */

#ifndef LIMITS_H
#define LIMITS_H

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "criupy.h"

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define PAGE ((size_t)CRIUPY_PAGE_SIZE)

#define CHECK(condition)                                                             \
	do {                                                                         \
		if (!(condition)) {                                                  \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__,       \
				#condition, strerror(errno));                        \
			_exit(1);                                                    \
		}                                                                    \
	} while (0)

/* ---- limits.c ------------------------------------------------------------------ */

uint64_t now_ns(void);
/* One line: key, unit, value. */
void report(const char *key, const char *unit, double value);
void report_sized(const char *key, size_t size, const char *unit, double value);
uint64_t random_next(uint64_t *seed);
/* The middle one of nr times, which are sorted. */
uint64_t middle(uint64_t *times, size_t nr);
/* Stay on the n-th core that there is for us, or on any with -1. */
void stay_on(int core);
int nr_cores(void);
/* Memory without huge pages that nothing has touched. */
uint8_t *map_memory(size_t length);
/* Use so much memory and give it back: the host of a virtual machine has to find
 * again what was free for a while, which would be measured instead. */
void warm_memory(size_t length);
/* A userfaultfd that is set up for missing faults in this memory. */
int open_uffd(uint8_t *memory, size_t length, int flags);
pthread_t start_thread(void *(*run)(void *), void *argument);
void join_thread(pthread_t thread);

/* ---- limits_core.c, limits_machine.c, limits_net.c ----------------------------- */

void measure_core(void);
void measure_machine(void);
void measure_net(void);

/* Two connected TCP sockets on the loopback interface. */
void connect_pair(int pair[2]);
int connect_to(const char *port);
void receive_all(int fd, void *into, size_t length);
void send_all(int fd, const void *data, size_t length);

/* Ask a source for nr_pages from address on, so many by one request and so many
 * outstanding at most; throw them away. */
int fetch(char **words);
/* The other end of a link that is measured, and this one. */
int serve(void);
int round_trip(char **words);
int stream(char **words);

#endif
