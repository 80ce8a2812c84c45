/* What the parts of our core cost: look-up, frames, and the ioctls. */

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "limits.h"

#define NR_LOOKUPS ((size_t)1 << 20)
#define NR_FRAMES ((size_t)1 << 21)
#define COPIED (128 * MIB)
#define STAGED (2 * MIB)	/* copied from again and again: in the cache, like what was just received */
#define NR_WAKES 100000
#define NR_WAITING 64

/* About a million pages in so many extents with holes between them. */
static struct criupy_image *make_image(size_t nr, uint64_t each)
{
	uint64_t *starts = malloc(nr * sizeof(*starts)), *nr_pages = malloc(nr * sizeof(*nr_pages));
	struct criupy_image *image;

	CHECK(starts && nr_pages);
	for (size_t i = 0; i < nr; i++) {
		starts[i] = (1 + i * (each + 1)) * PAGE;
		nr_pages[i] = each;
	}
	CHECK(!criupy_image_create(&image, 1, starts, nr_pages, NULL, NULL, nr));
	free(starts);
	free(nr_pages);
	return image;
}

static void measure_lookup(size_t nr)
{
	uint64_t each = nr < NR_LOOKUPS ? NR_LOOKUPS / nr : 1, seed = nr, page = 0, begin;
	struct criupy_image *image = make_image(nr, each);
	uint64_t *addresses = malloc(NR_LOOKUPS * sizeof(*addresses));
	struct criupy_space *space;
	size_t i = 0, done = 0;

	CHECK(addresses && !criupy_space_create(&space, image));
	for (size_t n = 0; n < NR_LOOKUPS; n++) {
		uint64_t extent = random_next(&seed) % nr;

		addresses[n] = (1 + extent * (each + 1) + random_next(&seed) % each) * PAGE;
	}
	begin = now_ns();
	while (i < NR_LOOKUPS) {
		/* The next one waits for this one's answer, as the pager does. */
		i += 1 + (criupy_space_lookup(space, addresses[i], &page) != CRIUPY_PAGE_MISSING);
		done++;
	}
	report_sized("lookup", nr, "ns", (double)(now_ns() - begin) / NR_LOOKUPS);
	CHECK(done == NR_LOOKUPS);
	criupy_space_destroy(space);
	criupy_image_destroy(image);
	free(addresses);
}

static void measure_frames(void)
{
	struct criupy_frame frame = { .cmd = CRIUPY_CMD_GET, .nr_pages = 1, .vaddr = PAGE, .dst_id = 1 };
	uint8_t encoded[CRIUPY_FRAME_32];
	uint64_t begin = now_ns();

	for (size_t i = 0; i < NR_FRAMES; i++) {
		frame.vaddr += PAGE;
		CHECK(!criupy_frame_encode(&frame, encoded, sizeof(encoded)));
		CHECK(!criupy_frame_decode(&frame, encoded, sizeof(encoded)));
	}
	report("frame", "ns", (double)(now_ns() - begin) / NR_FRAMES);
	CHECK(frame.vaddr == (NR_FRAMES + 1) * PAGE);
}

struct copying {
	int uffd;
	uint8_t *memory;
	size_t length;
	size_t chunk;
	const uint8_t *source;
	size_t source_length;
};

static void *copy_all(void *argument)
{
	const struct copying *c = argument;
	uint64_t progress;

	for (size_t at = 0; at < c->length; at += c->chunk)
		CHECK(!criupy_uffd_copy(c->uffd, (uintptr_t)c->memory + at, c->source + at % c->source_length,
					c->chunk, &progress));
	return NULL;
}

static double copy_rate(size_t chunk, size_t nr_threads, size_t source_length)
{
	uint8_t *memory = map_memory(COPIED), *source = map_memory(nr_threads * source_length);
	int uffd = open_uffd(memory, COPIED, 0);
	struct copying copying[2];
	pthread_t threads[2];
	uint64_t begin;

	memset(source, 1, nr_threads * source_length);
	warm_memory(COPIED);
	begin = now_ns();
	for (size_t i = 0; i < nr_threads; i++) {
		copying[i] = (struct copying) {
			uffd, memory + i * (COPIED / nr_threads), COPIED / nr_threads, chunk,
			source + i * source_length, source_length,
		};
		threads[i] = start_thread(copy_all, &copying[i]);
	}
	for (size_t i = 0; i < nr_threads; i++)
		join_thread(threads[i]);
	begin = now_ns() - begin;
	close(uffd);
	munmap(memory, COPIED);
	munmap(source, nr_threads * source_length);
	return (double)COPIED / (double)begin;
}

static void *touch(void *argument)
{
	CHECK(*(volatile uint8_t *)argument == 1);
	return NULL;
}

/* Single pages, where each copy wakes, and where one wake follows sixteen. Threads
 * that wait for other pages of the same memory are looked at by each wake. */
static double copy_pages_ns(bool later, size_t nr_waiting)
{
	const size_t length = 64 * MIB, batch = 16 * PAGE, waited = nr_waiting * PAGE;
	uint8_t *memory = map_memory(length + waited), *source = map_memory(STAGED);
	int uffd = open_uffd(memory, length + waited, 0);
	pthread_t waiting[NR_WAITING];
	uint64_t begin, progress;

	memset(source, 1, STAGED);
	warm_memory(length);
	for (size_t i = 0; i < nr_waiting; i++) {
		struct uffd_msg msg;

		waiting[i] = start_thread(touch, memory + length + i * PAGE);
		CHECK(read(uffd, &msg, sizeof(msg)) == sizeof(msg));
	}
	begin = now_ns();
	for (size_t at = 0; at < length; at += PAGE) {
		struct uffdio_copy copy = {
			.dst = (uintptr_t)memory + at,
			.src = (uintptr_t)source + at % STAGED,
			.len = PAGE,
			.mode = later ? UFFDIO_COPY_MODE_DONTWAKE : 0,
		};

		CHECK(!ioctl(uffd, UFFDIO_COPY, &copy));
		if (later && (at + PAGE) % batch == 0)
			CHECK(!criupy_uffd_wake(uffd, (uintptr_t)memory + at + PAGE - batch, batch));
	}
	begin = now_ns() - begin;
	if (nr_waiting)
		CHECK(!criupy_uffd_copy(uffd, (uintptr_t)memory + length, source, waited, &progress));
	for (size_t i = 0; i < nr_waiting; i++)
		join_thread(waiting[i]);
	close(uffd);
	munmap(memory, length + waited);
	munmap(source, STAGED);
	return (double)begin / (double)(length / PAGE);
}

static void measure_wake(void)
{
	uint8_t *memory = map_memory(MIB);
	int uffd = open_uffd(memory, MIB, 0);
	uint64_t begin = now_ns();

	for (int i = 0; i < NR_WAKES; i++)
		CHECK(!criupy_uffd_wake(uffd, (uintptr_t)memory, PAGE));
	report("wake", "us", (double)(now_ns() - begin) / NR_WAKES / 1000);
	close(uffd);
	munmap(memory, MIB);
}

void measure_core(void)
{
	static const size_t extents[] = { 1, 1024, 262144, 1000000 };
	static const size_t chunks[] = { 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB };

	for (size_t i = 0; i < sizeof(extents) / sizeof(*extents); i++)
		measure_lookup(extents[i]);
	measure_frames();
	for (size_t i = 0; i < sizeof(chunks) / sizeof(*chunks); i++) {
		report_sized("copy", chunks[i], "GB/s", copy_rate(chunks[i], 1, STAGED));
		report_sized("copy by two", chunks[i], "GB/s", copy_rate(chunks[i], 2, STAGED));
	}
	report("copy uncached", "GB/s", copy_rate(2 * MIB, 1, COPIED));
	report("copy page", "ns", copy_pages_ns(false, 0));
	report("copy page, wake later", "ns", copy_pages_ns(true, 0));
	report("copy page, waited", "ns", copy_pages_ns(false, NR_WAITING));
	report("copy page, waited, wake later", "ns", copy_pages_ns(true, NR_WAITING));
	measure_wake();
}
