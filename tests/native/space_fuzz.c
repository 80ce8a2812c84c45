/* The pure parts of the native core under random events, for sanitizers.
 *
 * A lazy space is compared with two arrays that know nothing of extents or
 * pieces: for each of a few hundred pages of a small world, which page of the
 * image is there, and for each page of the image, its state. The world's pages
 * lie in zones 4 GiB apart, so that lengths do not fit 32 bits.
 *
 * space_fuzz SEED ROUNDS */

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pager.h"

#define NR_ZONES 4
#define ZONE_PAGES 64
#define WORLD (NR_ZONES * ZONE_PAGES)
#define NOWHERE (-1)
#define NR_SPACES 5

#define CHECK(condition)                                                                   \
	do {                                                                               \
		if (!(condition)) {                                                        \
			fprintf(stderr, "%s:%d: round %d: %s\n", __FILE__, __LINE__,       \
				current_round, #condition);                               \
			exit(1);                                                           \
		}                                                                          \
	} while (0)

static int current_round;
static uint64_t seed;

static uint32_t random_below(uint32_t limit)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (uint32_t)(seed >> 11) % limit;
}

static uint64_t address_of(int world)
{
	return (uint64_t)(world / ZONE_PAGES + 1) * (UINT64_C(4) << 30) +
	       ((uint64_t)(world % ZONE_PAGES) << PAGE_SHIFT);
}

struct model {
	struct criupy_space *space;
	int there[WORLD];	/* the image's page at this place, NOWHERE */
	uint8_t state[WORLD];	/* by image page */
};

static struct criupy_image *image;
static int extent_of[WORLD];
static int nr_pages;
static uint8_t requested[WORLD];
static uint8_t extent_flags[WORLD];
static struct model models[NR_SPACES];
static int nr_models;

/* Number the pages, those of the source first. */
static void number_pages(struct model *m, const int *places, const uint64_t *nr, const uint64_t *data, size_t nr_extents)
{
	for (int local = 0; local < 2; local++) {
		for (size_t i = 0; i < nr_extents; i++) {
			if ((data[i] != CRIUPY_REMOTE) != local)
				continue;
			for (int k = 0; k < (int)nr[i]; k++) {
				extent_of[nr_pages] = (int)i;
				m->state[nr_pages] = CRIUPY_PAGE_MISSING;
				m->there[places[i] + k] = nr_pages++;
			}
		}
	}
}

static void make_image(void)
{
	uint64_t starts[WORLD], nr[WORLD], data[WORLD];
	int places[WORLD], kinds = (int)random_below(3);	/* source, files, both */
	size_t nr_extents = 0;
	struct model *m = &models[0];

	nr_pages = 0;
	memset(requested, 0, sizeof(requested));
	for (int i = 0; i < WORLD; i++)
		m->there[i] = NOWHERE;
	for (int i = 0; i < WORLD;) {
		int length = 1 + (int)random_below(12), rest = ZONE_PAGES - i % ZONE_PAGES;

		if (length > rest)
			length = rest;
		if (random_below(3)) {
			starts[nr_extents] = address_of(i);
			nr[nr_extents] = (uint64_t)length;
			extent_flags[nr_extents] = random_below(4) == 0;
			data[nr_extents] = kinds == 1 || (kinds == 2 && random_below(2)) ? 7 : CRIUPY_REMOTE;
			places[nr_extents++] = i;
		}
		i += length;
	}
	number_pages(m, places, nr, data, nr_extents);
	CHECK(!criupy_image_create(&image, 7, starts, nr, kinds ? data : NULL, extent_flags, nr_extents));
	CHECK(criupy_image_nr_pages(image) == (uint64_t)nr_pages);
	CHECK(!criupy_space_create(&m->space, image));
	nr_models = 1;
}

static uint64_t missing(const struct model *m)
{
	uint64_t nr = 0;

	for (int i = 0; i < nr_pages; i++)
		nr += m->state[i] == CRIUPY_PAGE_MISSING;
	return nr;
}

static void try_remove(struct model *m)
{
	int a = (int)random_below(WORLD), b = (int)random_below(WORLD);
	int low = a < b ? a : b, high = a < b ? b : a;
	uint64_t before = missing(m);

	if (random_below(2) && high - low > 6)
		high = low + 6;
	for (int i = low; i < high; i++)
		if (m->there[i] != NOWHERE)
			m->state[m->there[i]] = CRIUPY_PAGE_REMOVED;
	CHECK(criupy_space_remove(m->space, address_of(low), address_of(high) - address_of(low)) ==
	      (int64_t)(before - missing(m)));
}

static void try_remap(struct model *m)
{
	int moving[ZONE_PAGES];
	int length = 1 + (int)random_below(random_below(2) ? 4 : ZONE_PAGES - 1);
	int from = (int)random_below(NR_ZONES) * ZONE_PAGES + (int)random_below((uint32_t)(ZONE_PAGES - length));
	int to = (int)random_below(NR_ZONES) * ZONE_PAGES + (int)random_below((uint32_t)(ZONE_PAGES - length));

	CHECK(!criupy_space_remap(m->space, address_of(from), address_of(to), (uint64_t)length << PAGE_SHIFT));
	if (from == to)
		return;
	for (int i = 0; i < length; i++) {
		moving[i] = m->there[from + i];
		m->there[from + i] = NOWHERE;
	}
	for (int i = 0; i < length; i++) {
		if (m->there[to + i] != NOWHERE)
			m->state[m->there[to + i]] = CRIUPY_PAGE_REMOVED;
		m->there[to + i] = moving[i];
	}
}

static void try_set(struct model *m)
{
	int page = (int)random_below((uint32_t)nr_pages), nr = 1 + (int)random_below(20);
	uint8_t state = random_below(8) ? CRIUPY_PAGE_PRESENT : CRIUPY_PAGE_POISONED;

	if (nr > nr_pages - page)
		nr = nr_pages - page;
	criupy_space_set(m->space, (uint64_t)page, (uint64_t)nr, state);
	memset(m->state + page, state, (size_t)nr);
}

static void try_request(void)
{
	int page = (int)random_below((uint32_t)nr_pages), nr = 1 + (int)random_below(20);
	int asked = (int)random_below(2);

	if (nr > nr_pages - page)
		nr = nr_pages - page;
	criupy_image_set_requested(image, (uint64_t)page, (uint64_t)nr, asked);
	memset(requested + page, asked, (size_t)nr);
}

static void try_fork(const struct model *m)
{
	struct model *child;

	if (nr_models == NR_SPACES) {
		criupy_space_destroy(models[--nr_models].space);
		return;
	}
	child = &models[nr_models++];
	*child = *m;
	CHECK(!criupy_space_fork(m->space, &child->space));
	for (int i = 0; i < nr_pages; i++)
		if (extent_flags[extent_of[i]])
			child->state[i] = CRIUPY_PAGE_REMOVED;
}

static void check_kinds(const struct model *m)
{
	for (int kind = 0; kind < NR_KINDS; kind++) {
		uint64_t end = image_kind_end(image, kind), nr = 0;

		for (uint64_t page = image_kind_begin(image, kind); page < end; page++) {
			CHECK(image_kind(image, page) == kind);
			CHECK((image_extent_of(image, page)->data == CRIUPY_REMOTE) == (kind == REMOTE));
			nr += m->state[page] == CRIUPY_PAGE_MISSING;
		}
		CHECK(space_nr_missing(m->space, kind) == nr);
	}
}

static void compare(const struct model *m)
{
	for (int i = 0; i < WORLD; i++) {
		uint64_t page = 0;
		int state = criupy_space_lookup(m->space, address_of(i) + random_below(4096), &page);
		int expected = CRIUPY_PAGE_NONE;

		if (m->there[i] != NOWHERE) {
			CHECK(page == (uint64_t)m->there[i]);
			expected = m->state[page];
			if (expected == CRIUPY_PAGE_MISSING && requested[page])
				expected = CRIUPY_PAGE_IN_FLIGHT;
		}
		CHECK(state == expected);
	}
	for (int i = 0; i < WORLD; i++) {
		uint64_t addr, nr = 1 + random_below(30);
		int page = m->there[i];

		if (page == NOWHERE)
			continue;
		CHECK(!criupy_space_locate(m->space, (uint64_t)page, &addr, &nr));
		CHECK(addr == address_of(i) && nr >= 1);
		for (int k = 0; k < (int)nr; k++)
			CHECK(m->there[i + k] == page + k && extent_of[page + k] == extent_of[page]);
	}
	CHECK(criupy_space_nr_missing(m->space) == missing(m));
	CHECK(space_nr_missing(m->space, REMOTE) + space_nr_missing(m->space, LOCAL) == missing(m));
	check_kinds(m);
	for (int any = 0; any < 2; any++) {
		uint64_t page = random_below((uint32_t)nr_pages + 1), max = 1 + random_below(9), nr;
		int first = (int)page, length = 0;

#define WANTED(p) (m->state[p] == CRIUPY_PAGE_MISSING && (any || !requested[p]))
		while (first < nr_pages && !WANTED(first))
			first++;
		while (first + length < nr_pages && length < (int)max && WANTED(first + length) &&
		       extent_of[first + length] == extent_of[first])
			length++;
		nr = criupy_space_next_missing(m->space, &page, max, any);
		CHECK(nr == (uint64_t)length);
		CHECK(!nr || page == (uint64_t)first);
	}
}

static void fuzz_space(int rounds)
{
	for (current_round = 0; current_round < rounds; current_round++) {
		do {
			make_image();
			if (!nr_pages) {
				criupy_space_destroy(models[0].space);
				criupy_image_destroy(image);
			}
		} while (!nr_pages);
		for (int step = 0; step < 60; step++) {
			struct model *m = &models[random_below((uint32_t)nr_models)];

			switch (random_below(6)) {
			case 0:
				try_remove(m);
				break;
			case 1:
			case 2:
				try_remap(m);
				break;
			case 3:
				try_set(m);
				break;
			case 4:
				try_request();
				break;
			default:
				try_fork(m);
			}
			for (int i = 0; i < nr_models; i++)
				compare(&models[i]);
		}
		while (nr_models)
			criupy_space_destroy(models[--nr_models].space);
		criupy_image_destroy(image);
	}
}

static void fuzz_codec(int rounds)
{
	for (current_round = 0; current_round < rounds; current_round++) {
		size_t size = random_below(2) ? CRIUPY_FRAME_24 : CRIUPY_FRAME_32;
		struct criupy_frame frame = {
			.cmd = random_below(UINT32_MAX), .nr_pages = random_below(UINT32_MAX),
			.vaddr = seed, .dst_id = seed * 3,
		}, back;
		/* Exactly as large as said, so that a sanitizer sees one byte too many. */
		uint8_t *bytes = malloc(size), *none = malloc(1);

		CHECK(bytes && none);
		CHECK(!criupy_frame_encode(&frame, bytes, size));
		CHECK(!criupy_frame_decode(&back, bytes, size));
		CHECK(back.cmd == frame.cmd && back.nr_pages == frame.nr_pages &&
		      back.vaddr == frame.vaddr && back.dst_id == frame.dst_id);
		CHECK(!criupy_reply_check(&frame, &frame) ==
		      (frame.cmd == (CRIUPY_CMD_ADD_F | CRIUPY_PE_PRESENT << 16) && frame.nr_pages));
		for (size_t i = 0; i < size; i++)
			bytes[i] = (uint8_t)random_below(256);
		CHECK(!criupy_frame_decode(&back, bytes, size));
		CHECK(criupy_frame_encode(&frame, none, 1) == -EINVAL);
		CHECK(criupy_frame_decode(&back, none, 1) == -EINVAL);
		CHECK(criupy_histogram_bucket(seed >> random_below(64)) < CRIUPY_NR_BUCKETS);
		free(bytes);
		free(none);
	}
}

/* Pages of a file: every page numbered, extents in any order in it. */
static void check_local_pages(void)
{
	const uint64_t starts[] = { 0x10000, 0x20000, 0x21000 }, nr[] = { 3, 1, 4097 };
	const uint64_t data[] = { 4098, 4097, 0 }, beyond[] = { 4099, 4097, 0 }, far[] = { (UINT64_C(1) << 48) - 1, 0, 0 };
	const uint64_t total = 3 + 1 + 4097, file_page[] = { 4098, 4099, 4100, 4097, 0 };
	const uint64_t gap[] = { 4098, UINT64_C(2) << CRIUPY_FILE_SHIFT, 0 };	/* no file 1 */
	int fd = memfd_create("pages", MFD_CLOEXEC);
	const struct run runs[] = { { 1, 2 }, { 3, 1 }, { 4, 1 } };
	const uint64_t read_page[] = { 4099, 4100, 4097, 0 };
	static uint64_t bytes[5 * CRIUPY_PAGE_SIZE / sizeof(uint64_t)];

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)(total << PAGE_SHIFT)));
	for (uint64_t i = 0; i < total; i++)
		CHECK(pwrite(fd, &i, sizeof(i), (off_t)(i << PAGE_SHIFT)) == sizeof(i));
	CHECK(!criupy_image_create(&image, 1, starts, nr, beyond, NULL, 3));
	CHECK(criupy_image_attach(image, fd) == -ENODATA);
	criupy_image_destroy(image);
	CHECK(!criupy_image_create(&image, 1, starts, nr, far, NULL, 3));
	CHECK(criupy_image_attach(image, fd) == -ENODATA);
	criupy_image_destroy(image);
	CHECK(!criupy_image_create(&image, 1, starts, nr, NULL, NULL, 3));
	CHECK(criupy_image_attach(image, fd) == -EINVAL);
	criupy_image_destroy(image);
	CHECK(!criupy_image_create(&image, 1, starts, nr, gap, NULL, 3));
	CHECK(!criupy_image_attach(image, fd) && criupy_image_attach(image, fd) == -EINVAL);
	criupy_image_destroy(image);
	CHECK(!criupy_image_create(&image, 1, starts, nr, data, NULL, 3));
	CHECK(!criupy_image_attach(image, fd) && criupy_image_attach(image, fd) == -EINVAL);
	for (uint64_t page = 0; page < total; page++) {
		const struct run one = { page, 1 };

		CHECK(!image_read(image, &one, 1, (uint8_t *)bytes));
		CHECK(bytes[0] == (page < 5 ? file_page[page] : page - 4));
	}
	/* Runs whose data lies together, and apart. */
	CHECK(!image_read(image, runs, 3, (uint8_t *)bytes));
	for (uint64_t i = 0; i < 4; i++)
		CHECK(bytes[i * CRIUPY_PAGE_SIZE / sizeof(bytes[0])] == read_page[i]);
	CHECK(!ftruncate(fd, CRIUPY_PAGE_SIZE));
	CHECK(!image_read(image, &runs[2], 1, (uint8_t *)bytes));
	CHECK(image_read(image, runs, 1, (uint8_t *)bytes) == -ENODATA);
	criupy_image_destroy(image);
	close(fd);
}

/* The first and last page and the places around of each of so many extents. */
static void check_lookups(size_t nr_extents)
{
	static uint64_t starts[1000], nr[1000];
	uint64_t end = 0, first = 0;

	for (size_t i = 0; i < nr_extents; i++) {
		starts[i] = end + ((uint64_t)(random_below(3)) << PAGE_SHIFT);
		nr[i] = 1 + random_below(3);
		end = starts[i] + (nr[i] << PAGE_SHIFT);
	}
	CHECK(!criupy_image_create(&image, 1, starts, nr, NULL, NULL, nr_extents));
	for (size_t i = 0; i < nr_extents; first += nr[i++]) {
		uint64_t beyond = starts[i] + (nr[i] << PAGE_SHIFT);

		CHECK(image_extent_of(image, first) == &image->extents[i]);
		CHECK(image_extent_of(image, first + nr[i] - 1) == &image->extents[i]);
		CHECK(image_extent_after(image, REMOTE, starts[i]) == i);
		CHECK(image_extent_after(image, REMOTE, beyond - 1) == i);
		CHECK(image_extent_after(image, REMOTE, beyond) == i + 1);
		/* Nothing lies between two extents. */
		CHECK(i + 1 == nr_extents || starts[i + 1] == beyond || image_extent_after(image, REMOTE, starts[i + 1] - 1) == i + 1);
	}
	CHECK(!nr_extents || image_extent_after(image, REMOTE, 0) == 0);
	CHECK(image_extent_after(image, REMOTE, UINT64_MAX) == nr_extents);
	criupy_image_destroy(image);
}

static void *push_notices(void *arg)
{
	struct notices *notices = arg;

	for (uint64_t i = 0; i < 200000; i++)
		while (!notices_push(notices, (struct criupy_notice){ .kind = 1, .a = i, .b = ~i }))
			;
	return NULL;
}

static void check_notices(void)
{
	static struct notices notices;
	struct criupy_notice notice;
	pthread_t writer;

	CHECK(!notices_pop(&notices, &notice));
	for (uint64_t i = 0; i < NOTICE_RING; i++)
		CHECK(notices_push(&notices, (struct criupy_notice){ .a = i }));
	CHECK(!notices_push(&notices, (struct criupy_notice){ .a = 99 }));
	for (uint64_t i = 0; i < NOTICE_RING; i++)
		CHECK(notices_pop(&notices, &notice) && notice.a == i);
	CHECK(!notices_pop(&notices, &notice));
	/* The counters go round through 2^32. */
	atomic_store(&notices.head, UINT32_MAX - 5);
	atomic_store(&notices.tail, UINT32_MAX - 5);
	CHECK(!pthread_create(&writer, NULL, push_notices, &notices));
	for (uint64_t i = 0; i < 200000;) {
		if (!notices_pop(&notices, &notice))
			continue;
		CHECK(notice.a == i && notice.b == ~i);
		i++;
	}
	CHECK(!pthread_join(writer, NULL));
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	seed = strtoull(argv[1], NULL, 0) * UINT64_C(0x9E3779B97F4A7C15) | 1;
	check_local_pages();
	/* Around each multiple of how many a landmark stands for. */
	for (size_t nr_extents = 0; nr_extents <= 1000; nr_extents += 1 + nr_extents / 200)
		check_lookups(nr_extents);
	check_notices();
	fuzz_codec(20000);
	fuzz_space(atoi(argv[2]));
	return 0;
}
