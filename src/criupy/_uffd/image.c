/* What the images say of one dumped task: where its lazy pages were, and which
 * of them have been asked for.
 *
 * Pages are numbered through all extents in address order. That number is the
 * key of every per-page table (here: requested; in each lazy space: the state),
 * so a page keeps it whatever the task does to its mappings, and a fork copies
 * one byte a page.
 *
 * "requested" belongs here and not to a lazy space, because one reply serves
 * every address space that came from this task by fork, also one that was
 * forked after the request went out. */

#include <sys/mman.h>
#include <sys/stat.h>

#include "internal.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22	/* Linux 5.14 */
#endif

/* The largest folio that the kernel maps along with a page it has in its cache
 * anyway. All of it counts as ours. */
#define MAP_WINDOW (UINT64_C(2) << 20)

static bool extents_are_sane(const uint64_t *starts, const uint64_t *nr_pages, size_t nr)
{
	uint64_t end = 0, total = 0;

	for (size_t i = 0; i < nr; i++) {
		if (starts[i] % CRIUPY_PAGE_SIZE || starts[i] < end || !nr_pages[i])
			return false;
		if (nr_pages[i] > (UINT64_MAX - starts[i]) >> PAGE_SHIFT)
			return false;
		end = starts[i] + (nr_pages[i] << PAGE_SHIFT);
		total += nr_pages[i];
	}
	/* One byte of state a page: 2^40 pages are 4 PiB, more than any machine. */
	return total <= UINT64_C(1) << 40;
}

int criupy_image_create(struct criupy_image **image, uint64_t id, const uint64_t *starts,
			const uint64_t *nr_pages, const uint64_t *data_pages,
			const uint8_t *flags, size_t nr_extents)
{
	struct criupy_image *img;
	uint64_t first = 0;

	if (!extents_are_sane(starts, nr_pages, nr_extents))
		return -EINVAL;
	img = calloc(1, sizeof(*img));
	if (!img)
		return -ENOMEM;
	img->id = id;
	img->nr_extents = nr_extents;
	img->has_data = data_pages != NULL;
	img->extents = malloc((nr_extents + 1) * sizeof(*img->extents));
	if (!img->extents)
		goto no_memory;
	for (size_t i = 0; i < nr_extents; i++) {
		img->extents[i] = (struct extent){
			.start = starts[i],
			.nr_pages = nr_pages[i],
			.first = first,
			.data = data_pages ? data_pages[i] : 0,
		};
		first += nr_pages[i];
	}
	img->nr_pages = first;
	img->requested = calloc(first + 1, 1);
	if (!img->requested)
		goto no_memory;
	if (flags) {
		img->flags = malloc(nr_extents + 1);
		if (!img->flags)
			goto no_memory;
		memcpy(img->flags, flags, nr_extents);
	}
	*image = img;
	return 0;

no_memory:
	criupy_image_destroy(img);
	return -ENOMEM;
}

void criupy_image_destroy(struct criupy_image *image)
{
	if (!image)
		return;
	if (image->map)
		munmap(image->map, image->map_length);
	free(image->extents);
	free(image->flags);
	free(image->requested);
	free(image);
}

int criupy_image_map(struct criupy_image *image, int fd)
{
	struct stat st;
	void *map;

	if (image->map || !image->has_data)
		return -EINVAL;
	if (fstat(fd, &st) < 0)
		return -errno;
	for (size_t i = 0; i < image->nr_extents; i++) {
		const struct extent *e = &image->extents[i];
		uint64_t pages_in_file = (uint64_t)st.st_size >> PAGE_SHIFT;

		if (e->data > pages_in_file || e->nr_pages > pages_in_file - e->data)
			return -ENODATA;
	}
	if (!st.st_size)
		return 0;
	map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return -errno;
	image->map = map;
	image->map_length = (uint64_t)st.st_size;
	return 0;
}

const uint8_t *image_data(struct criupy_image *image, uint64_t page, uint64_t nr)
{
	const struct extent *e = image_extent_of(image, page);
	uint64_t offset = (e->data + page - e->first) << PAGE_SHIFT, length = nr << PAGE_SHIFT;
	uint8_t *data = image->map + offset;

	/* What is behind us is given back before something new is mapped. */
	if (offset < image->window_start || offset + length > image->window_end) {
		if (image->window_end)
			(void)madvise(image->map + image->window_start,
				      image->window_end - image->window_start, MADV_DONTNEED);
		image->window_start = offset & ~(MAP_WINDOW - 1);
		image->window_end = min_u64((offset + length + MAP_WINDOW - 1) & ~(MAP_WINDOW - 1),
					    image->map_length);
	}
	/* A source that is not resident makes the kernel take the slow way,
	 * outside the target's lock. A file that has shrunk says EFAULT here;
	 * before Linux 5.14 (EINVAL) the copy itself will. */
	if (madvise(data, length, MADV_POPULATE_READ) < 0 && errno != EINVAL)
		return NULL;
	return data;
}

uint64_t criupy_image_nr_pages(const struct criupy_image *image)
{
	return image->nr_pages;
}

void criupy_image_set_requested(struct criupy_image *image, uint64_t page, uint64_t nr, int requested)
{
	memset(image->requested + page, requested != 0, nr);
}

void image_mark(struct criupy_image *image, uint64_t page, uint64_t nr, uint8_t requested)
{
	for (uint64_t i = page; i < page + nr; i++)
		image->requested[i] |= requested;
}

void image_unmark(struct criupy_image *image, uint64_t page, uint64_t nr, uint8_t requested)
{
	for (uint64_t i = page; i < page + nr; i++)
		image->requested[i] &= (uint8_t)~requested;
}

const struct extent *image_extent_of(const struct criupy_image *image, uint64_t page)
{
	size_t low = 0, high = image->nr_extents;

	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;

		if (image->extents[middle].first <= page)
			low = middle;
		else
			high = middle;
	}
	return &image->extents[low];
}

size_t image_extent_after(const struct criupy_image *image, uint64_t addr)
{
	size_t low = 0, high = image->nr_extents;

	while (low < high) {
		size_t middle = low + (high - low) / 2;
		const struct extent *e = &image->extents[middle];

		if (e->start + (e->nr_pages << PAGE_SHIFT) > addr)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}
