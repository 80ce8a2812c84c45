/* SPDX-License-Identifier: MIT */
/* The workload's memory: what every page holds, and the model of where it is. */
#include "workload.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

/*
 * The pattern. Word j of a page is `key ^ (j + 1) * RAMP` where the key mixes
 * seed, task, page index and generation. So a page that was swapped, shifted
 * or torn is wrong in nearly every word, no populated page is all zero, and both
 * C (vectorised) and Python (one XOR of big integers) make it at memory speed.
 */
#define RAMP 0x9e3779b97f4a7c15ull

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static uint64_t pattern_key(const struct model *model, uint64_t page, uint32_t generation)
{
	return mix(mix(mix(model->seed) + ((uint64_t)model->task << 32 | generation)) + page);
}

uint64_t pattern_first(const struct model *model, uint64_t page, uint32_t generation)
{
	return pattern_key(model, page, generation) ^ RAMP;
}

void pattern_write(const struct model *model, uint64_t page, uint32_t generation, uint64_t *words)
{
	uint64_t key = pattern_key(model, page, generation);

	for (uint64_t j = 0; j < WORDS; j++)
		words[j] = key ^ (j + 1) * RAMP;
}

enum check bytes_check(const void *bytes, const struct model *model, const struct segment *segment, uint64_t page)
{
	const uint64_t *words = bytes;
	bool data = segment_holds_data(segment, page);
	uint64_t key = data ? pattern_key(model, page, segment->generation) : 0;
	uint64_t ramp = data ? RAMP : 0;
	uint64_t differs = 0, any = 0;

	for (uint64_t j = 0; j < WORDS; j++) {
		uint64_t word = words[j];

		differs |= word ^ key ^ (j + 1) * ramp;
		any |= word;
	}
	if (!differs)
		return CHECK_GOOD;
	return any ? CHECK_WRONG : CHECK_ZERO;
}

uint64_t segment_address(const struct segment *segment, uint64_t page)
{
	return segment->address + (page - segment->first) * PAGE;
}

bool segment_holds_data(const struct segment *segment, uint64_t page)
{
	return !segment->zero && (page - segment->origin) % segment->stride == 0;
}

void model_init(struct model *model, const struct options *options, uint32_t task)
{
	uint64_t area_pages = options->size / PAGE / options->areas;
	uint64_t distance = area_pages * PAGE + (options->adjacent ? 0 : AREA_GAP);
	uint64_t page = 0;

	memset(model, 0, sizeof(*model));
	pthread_mutex_init(&model->mutex, NULL);
	model->seed = options->seed;
	model->task = task;
	for (uint32_t i = 0; i < options->areas; i++, page += area_pages)
		model->segments[model->nr_segments++] = (struct segment){
			.address = AREA_BASE + i * distance,
			.first = page,
			.nr_pages = area_pages,
			.stride = options->stride,
		};
	if (options->reserve) {
		uint64_t nr_pages = options->reserve / PAGE;

		model->segments[model->nr_segments++] = (struct segment){
			.address = RESERVE_BASE,
			.first = page,
			.nr_pages = nr_pages,
			.origin = page,
			.stride = nr_pages / RESERVE_PAGES,
		};
		page += nr_pages;
	}
	model->nr_pages = page;
}

/*
 * Map every segment where the model says. Adjacent areas alternate in an madvise flag, or the kernel would
 * merge them into one VMA.
 */
int model_map(const struct model *model)
{
	for (uint32_t i = 0; i < model->nr_segments; i++) {
		const struct segment *segment = &model->segments[i];
		void *address = (void *)segment->address;
		size_t length = segment->nr_pages * PAGE;

		if (mmap(address, length, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) != address)
			return -errno;
		if (i % 2 && madvise(address, length, MADV_DONTDUMP))
			return -errno;
	}
	return 0;
}

void model_fill(const struct model *model)
{
	for (uint32_t i = 0; i < model->nr_segments; i++) {
		const struct segment *segment = &model->segments[i];

		/* a huge page would populate the neighbours too */
		if (segment->stride > 1)
			madvise((void *)segment->address, segment->nr_pages * PAGE, MADV_NOHUGEPAGE);
		for (uint64_t n = 0; n < segment->nr_pages; n++)
			if (segment_holds_data(segment, segment->first + n))
				pattern_write(model, segment->first + n, 0,
					      (uint64_t *)(segment->address + n * PAGE));
	}
}

/*
 * Readers (checks and touches) take no lock: they note the version, use the
 * model, and throw their finding away when the version moved meanwhile. So one
 * thread can touch pages while another moves or discards them.
 */
void model_change_begin(struct model *model)
{
	pthread_mutex_lock(&model->mutex);
	atomic_fetch_add(&model->version, 1);
	atomic_thread_fence(memory_order_seq_cst);
}

void model_change_end(struct model *model)
{
	atomic_thread_fence(memory_order_seq_cst);
	atomic_fetch_add(&model->version, 1);
	pthread_mutex_unlock(&model->mutex);
}

uint32_t model_read_begin(const struct model *model)
{
	uint32_t version;

	while ((version = atomic_load(&model->version)) % 2)
		pause_us(10);
	return version;
}

bool model_read_valid(const struct model *model, uint32_t version)
{
	atomic_thread_fence(memory_order_seq_cst);
	return atomic_load(&model->version) == version;
}

/* The index of the segment with this page or else of the next one, nr_segments when there is none. */
uint32_t model_find(const struct model *model, uint64_t page)
{
	uint32_t low = 0, high = model->nr_segments;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct segment *segment = &model->segments[middle];

		if (segment->first + segment->nr_pages <= page)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static int cut_at(struct model *model, uint64_t page)
{
	uint32_t index = model_find(model, page);
	struct segment *segment = &model->segments[index];
	uint64_t head;

	if (index == model->nr_segments || segment->first >= page)
		return 0;
	if (model->nr_segments == MAX_SEGMENTS)
		return -ENOSPC;
	memmove(segment + 1, segment, (model->nr_segments - index) * sizeof(*segment));
	model->nr_segments++;
	head = page - segment->first;
	segment[0].nr_pages = head;
	segment[1].address += head * PAGE;
	segment[1].first = page;
	segment[1].nr_pages -= head;
	return 0;
}

/* Make [first, end) begin and end at segment borders. */
int model_cut(struct model *model, uint64_t first, uint64_t end)
{
	int ret = cut_at(model, first);

	return ret ? ret : cut_at(model, end);
}

void model_remove(struct model *model, uint32_t index)
{
	struct segment *segment = &model->segments[index];

	model->nr_segments--;
	memmove(segment, segment + 1, (model->nr_segments - index) * sizeof(*segment));
}
