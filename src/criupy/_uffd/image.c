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

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define LANDMARK_SHIFT 6

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

static size_t nr_landmarks(const struct criupy_image *image)
{
	return (image->nr_extents + (1u << LANDMARK_SHIFT) - 1) >> LANDMARK_SHIFT;
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
	img->file = -1;
	img->nr_extents = nr_extents;
	img->has_data = data_pages != NULL;
	img->extents = malloc((nr_extents + 1) * sizeof(*img->extents));
	img->landmark_starts = malloc((nr_landmarks(img) + 1) * sizeof(*img->landmark_starts));
	img->landmark_firsts = malloc((nr_landmarks(img) + 1) * sizeof(*img->landmark_firsts));
	if (!img->extents || !img->landmark_starts || !img->landmark_firsts)
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
	for (size_t i = 0; i < nr_landmarks(img); i++) {
		const struct extent *e = &img->extents[i << LANDMARK_SHIFT];

		img->landmark_starts[i] = e->start;
		img->landmark_firsts[i] = e->first;
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
	if (image->file >= 0)
		close(image->file);
	free(image->extents);
	free(image->landmark_starts);
	free(image->landmark_firsts);
	free(image->flags);
	free(image->requested);
	free(image);
}

int criupy_image_attach(struct criupy_image *image, int fd)
{
	struct stat st;

	if (image->file >= 0 || !image->has_data)
		return -EINVAL;
	if (fstat(fd, &st) < 0)
		return -errno;
	for (size_t i = 0; i < image->nr_extents; i++) {
		const struct extent *e = &image->extents[i];
		uint64_t pages_in_file = (uint64_t)st.st_size >> PAGE_SHIFT;

		if (e->data > pages_in_file || e->nr_pages > pages_in_file - e->data)
			return -ENODATA;
	}
	image->file = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	return image->file < 0 ? -errno : 0;
}

static uint64_t file_page(const struct criupy_image *image, uint64_t page)
{
	const struct extent *e = image_extent_of(image, page);

	return e->data + page - e->first;
}

static int read_whole(int fd, uint8_t *into, size_t length, uint64_t offset)
{
	while (length) {
		ssize_t got = pread(fd, into, length, (off_t)offset);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (!got)
			return -ENODATA;
		into += got;
		length -= (size_t)got;
		offset += (uint64_t)got;
	}
	return 0;
}

int image_read(const struct criupy_image *image, const struct run *runs, uint32_t nr_runs, uint8_t *into)
{
	uint32_t i = 0;
	int ret = 0;

	while (i < nr_runs && !ret) {
		uint64_t first = file_page(image, runs[i].page), nr = runs[i].nr_pages;

		/* Extents lie in the file as they do in memory, without the gaps. */
		for (i++; i < nr_runs && file_page(image, runs[i].page) == first + nr; i++)
			nr += runs[i].nr_pages;
		ret = read_whole(image->file, into, nr << PAGE_SHIFT, first << PAGE_SHIFT);
		into += nr << PAGE_SHIFT;
	}
	return ret;
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

/* The extents from the last landmark on that is not beyond a key, up to the next one or
 * to the end. */
static size_t extents_from(const struct criupy_image *image, const uint64_t *landmarks, uint64_t key,
			   size_t *end)
{
	size_t low = 0, high = nr_landmarks(image);

	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;

		if (landmarks[middle] <= key)
			low = middle;
		else
			high = middle;
	}
	*end = min_u64((low + 1) << LANDMARK_SHIFT, image->nr_extents);
	return low << LANDMARK_SHIFT;
}

const struct extent *image_extent_of(const struct criupy_image *image, uint64_t page)
{
	size_t high, low = extents_from(image, image->landmark_firsts, page, &high);

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
	/* If it is none of these, it is the one where the next landmark is. */
	size_t high, low = extents_from(image, image->landmark_starts, addr, &high);

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
