/* A process that changes its lazy memory from several threads and checks it.
 *
 * stress_target SEED ROUNDS: hands its userfaultfd and the address of its
 * memory over on descriptor 3, reads a byte, then works. Each thread owns a
 * slice of the memory and knows what every page of it must read as. Exit: 0
 * when all did, 42 when a page was poisoned (SIGBUS), 1 when a page was wrong.
 *
 * A page's data is its dump-time page number plus one, in every word. */

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "criupy.h"
#include "stress.h"

#define SLOT 16			/* pages that move together */
#define NR_SLOTS (SLICE_PAGES / SLOT)
#define WORDS (CRIUPY_PAGE_SIZE / sizeof(uint64_t))

struct slice {
	uint64_t seed;
	int rounds;
	char *home;		/* where its slots were dumped */
	char *spare;		/* room for every slot to move to */
	char *at[NR_SLOTS];
	uint64_t expected[SLICE_PAGES];
};

static char *memory;

static void fail(const char *what)
{
	perror(what);
	_exit(1);
}

static uint32_t random_below(struct slice *s, uint32_t limit)
{
	s->seed ^= s->seed << 13;
	s->seed ^= s->seed >> 7;
	s->seed ^= s->seed << 17;
	return (uint32_t)(s->seed >> 11) % limit;
}

static char *page_at(const struct slice *s, int page)
{
	return s->at[page / SLOT] + (size_t)(page % SLOT) * CRIUPY_PAGE_SIZE;
}

static void check(const struct slice *s, int page)
{
	const volatile uint64_t *words = (const volatile uint64_t *)(void *)page_at(s, page);

	for (size_t i = 0; i < WORDS; i += WORDS / 8 - 1) {
		uint64_t word = words[i];

		if (word == s->expected[page])
			continue;
		fprintf(stderr, "page %d of %p: word %zu is %#llx, not %#llx\n", page, (void *)s->home, i,
			(unsigned long long)word, (unsigned long long)s->expected[page]);
		_exit(1);
	}
}

static void check_all(const struct slice *s)
{
	for (int i = 0; i < SLICE_PAGES; i++)
		check(s, i);
}

static void drop(struct slice *s)
{
	int slot = (int)random_below(s, NR_SLOTS), first = (int)random_below(s, SLOT);
	int nr = 1 + (int)random_below(s, (uint32_t)(SLOT - first));

	if (madvise(page_at(s, slot * SLOT + first), (size_t)nr * CRIUPY_PAGE_SIZE, MADV_DONTNEED))
		fail("madvise");
	memset(&s->expected[slot * SLOT + first], 0, (size_t)nr * sizeof(s->expected[0]));
}

static void move(struct slice *s)
{
	int slot = (int)random_below(s, NR_SLOTS);
	size_t offset = (size_t)slot * SLOT * CRIUPY_PAGE_SIZE;
	char *to = s->at[slot] == s->home + offset ? s->spare + offset : s->home + offset;

	if (mremap(s->at[slot], SLOT * CRIUPY_PAGE_SIZE, SLOT * CRIUPY_PAGE_SIZE,
		   MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		fail("mremap");
	s->at[slot] = to;
}

static void write_page(struct slice *s)
{
	int page = (int)random_below(s, SLICE_PAGES);
	uint64_t value = s->seed | 1, *words = (uint64_t *)(void *)page_at(s, page);

	for (size_t i = 0; i < WORDS; i++)
		words[i] = value;
	s->expected[page] = value;
}

static void move_border(struct slice *s)
{
	char *page = page_at(s, (int)random_below(s, SLICE_PAGES));

	if (mprotect(page, CRIUPY_PAGE_SIZE, PROT_READ))
		fail("mprotect");
	if (random_below(s, 2) && mprotect(page, CRIUPY_PAGE_SIZE, PROT_READ | PROT_WRITE))
		fail("mprotect");
	else if (mprotect(s->at[0], CRIUPY_PAGE_SIZE, PROT_READ | PROT_WRITE) ||
		 mprotect(page, CRIUPY_PAGE_SIZE, PROT_READ | PROT_WRITE))
		fail("mprotect");
}

static void split_off(struct slice *s)
{
	int status;
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (!pid) {
		/* It goes its own way, and may miss pages that the parent has. */
		drop(s);
		write_page(s);
		for (int i = 0; i < 20; i++)
			check(s, (int)random_below(s, SLICE_PAGES));
		_exit(0);
	}
	if (waitpid(pid, &status, 0) != pid)
		fail("waitpid");
	if (!WIFEXITED(status) || (WEXITSTATUS(status) && WEXITSTATUS(status) != EXIT_POISONED))
		fail("a child was wrong");
}

static void *work(void *arg)
{
	struct slice *s = arg;

	for (int i = 0; i < s->rounds; i++) {
		switch (random_below(s, 64)) {
		case 0:
			split_off(s);
			break;
		case 1:
		case 2:
			drop(s);
			break;
		case 3:
		case 4:
			move(s);
			break;
		case 5:
			move_border(s);
			break;
		case 6:
		case 7:
			write_page(s);
			break;
		default:
			check(s, (int)random_below(s, SLICE_PAGES));
		}
	}
	check_all(s);
	return NULL;
}

static void poisoned(int signal)
{
	(void)signal;
	_exit(EXIT_POISONED);
}

static void *map(size_t length)
{
	char *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

static void hand_over(int uffd)
{
	union {
		char room[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { { 0 } };
	struct iovec address = { &memory, sizeof(memory) };
	struct msghdr message = { .msg_iov = &address, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&message);
	char go;

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &uffd, sizeof(uffd));
	if (sendmsg(3, &message, 0) != sizeof(memory) || read(3, &go, 1) != 1)
		fail("hand over");
	close(uffd);
}

int main(int argc, char **argv)
{
	const size_t length = (size_t)SLICE_PAGES * CRIUPY_PAGE_SIZE;
	static struct slice slices[NR_SLICES];
	pthread_t threads[NR_SLICES];
	uint64_t features;
	int uffd;

	if (argc != 3)
		return 2;
	signal(SIGBUS, poisoned);
	memory = map(NR_SLICES * length);
	for (int i = 0; i < NR_SLICES; i++) {
		struct slice *s = &slices[i];

		*s = (struct slice){ .seed = (strtoull(argv[1], NULL, 0) + 1) * (uint64_t)(i + 1) * 7919,
				     .rounds = atoi(argv[2]), .home = memory + (size_t)i * length,
				     .spare = map(length) };
		for (int slot = 0; slot < NR_SLOTS; slot++)
			s->at[slot] = s->home + (size_t)slot * SLOT * CRIUPY_PAGE_SIZE;
		for (int page = 0; page < SLICE_PAGES; page++)
			s->expected[page] = (uint64_t)(uintptr_t)(s->home) / CRIUPY_PAGE_SIZE + (uint64_t)page + 1;
	}
	uffd = criupy_uffd_open(O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0 ||
	    criupy_uffd_api(uffd, UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
				  UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP, &features) ||
	    criupy_uffd_register(uffd, (uint64_t)(uintptr_t)memory, NR_SLICES * length, &features))
		fail("userfaultfd");
	hand_over(uffd);
	for (int i = 0; i < NR_SLICES; i++)
		if (pthread_create(&threads[i], NULL, work, &slices[i]))
			fail("pthread_create");
	for (int i = 0; i < NR_SLICES; i++)
		pthread_join(threads[i], NULL);
	return 0;
}
