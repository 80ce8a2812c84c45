/* What the images say of one dumped task: where its lazy pages were, and which
 * of them have been asked for.
 *
 * Pages are numbered through all extents, first those that the source has and then
 * those of pages files, each kind in address order. That number is the
 * key of every per-page table (here: requested; in each lazy space: the state),
 * so a page keeps it whatever the task does to its mappings, and a fork copies
 * one byte a page. As each kind's pages have numbers of their own, to look for the next
 * one to ask for is to search a row of bytes, with none of the other kind between.
 *
 * "requested" belongs here and not to a lazy space, because one reply serves
 * every address space that came from this task by fork, also one that was
 * forked after the request went out. */

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"

#define LANDMARK_SHIFT 6
#define PAGE_MASK ((UINT64_C(1) << CRIUPY_FILE_SHIFT) - 1)	/* the page in one of the files */

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

static size_t nr_landmarks(const struct part *part)
{
	return (part->end - part->begin + (1u << LANDMARK_SHIFT) - 1) >> LANDMARK_SHIFT;
}

static int set_landmarks(const struct criupy_image *image, struct part *part)
{
	part->landmark_starts = malloc((nr_landmarks(part) + 1) * sizeof(*part->landmark_starts));
	part->landmark_firsts = malloc((nr_landmarks(part) + 1) * sizeof(*part->landmark_firsts));
	if (!part->landmark_starts || !part->landmark_firsts)
		return -ENOMEM;
	for (size_t i = 0; i < nr_landmarks(part); i++) {
		const struct extent *e = &image->extents[part->begin + (i << LANDMARK_SHIFT)];

		part->landmark_starts[i] = e->start;
		part->landmark_firsts[i] = e->first;
	}
	return 0;
}

int criupy_image_create(struct criupy_image **image, uint64_t id, const uint64_t *starts,
			const uint64_t *nr_pages, const uint64_t *data_pages,
			const uint8_t *flags, size_t nr_extents)
{
	struct criupy_image *img;
	uint64_t first = 0;
	size_t nr = 0;

	if (!extents_are_sane(starts, nr_pages, nr_extents))
		return -EINVAL;
	img = calloc(1, sizeof(*img));
	if (!img)
		return -ENOMEM;
	img->id = id;
	img->nr_extents = nr_extents;
	img->extents = malloc((nr_extents + 1) * sizeof(*img->extents));
	img->flags = flags ? malloc(nr_extents + 1) : NULL;
	if (!img->extents || (flags && !img->flags))
		goto no_memory;
	for (int kind = 0; kind < NR_KINDS; kind++) {
		struct part *part = &img->parts[kind];

		part->begin = nr;
		if (kind == LOCAL)
			img->first_local = first;
		for (size_t i = 0; i < nr_extents; i++) {
			uint64_t data = data_pages ? data_pages[i] : CRIUPY_REMOTE;

			if ((data != CRIUPY_REMOTE) != (kind == LOCAL))
				continue;
			img->extents[nr] = (struct extent){
				.start = starts[i], .nr_pages = nr_pages[i], .first = first, .data = data,
			};
			if (kind == LOCAL && data >> CRIUPY_FILE_SHIFT >= img->nr_files_needed)
				img->nr_files_needed = (uint32_t)(data >> CRIUPY_FILE_SHIFT) + 1;
			if (flags)
				img->flags[nr] = flags[i];
			first += nr_pages[i];
			nr++;
		}
		part->end = nr;
		if (set_landmarks(img, part))
			goto no_memory;
	}
	img->has_data = data_pages && !img->parts[REMOTE].end;
	img->nr_pages = first;
	img->requested = calloc(first + 1, 1);
	img->files = malloc((img->nr_files_needed + 1) * sizeof(*img->files));
	if (!img->requested || !img->files)
		goto no_memory;
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
	for (uint32_t i = 0; i < image->nr_files; i++)
		close(image->files[i]);
	for (int kind = 0; kind < NR_KINDS; kind++) {
		free(image->parts[kind].landmark_starts);
		free(image->parts[kind].landmark_firsts);
	}
	free(image->extents);
	free(image->flags);
	free(image->requested);
	free(image->files);
	free(image);
}

int criupy_image_attach(struct criupy_image *image, int fd)
{
	const struct part *part = &image->parts[LOCAL];
	bool used = false;
	struct stat st;
	int file;

	if (image->nr_files == image->nr_files_needed)
		return -EINVAL;
	if (fstat(fd, &st) < 0)
		return -errno;
	for (size_t i = part->begin; i < part->end; i++) {
		const struct extent *e = &image->extents[i];
		uint64_t pages_in_file = (uint64_t)st.st_size >> PAGE_SHIFT, page = e->data & PAGE_MASK;

		if (e->data >> CRIUPY_FILE_SHIFT != image->nr_files)
			continue;
		if (page > pages_in_file || e->nr_pages > pages_in_file - page)
			return -ENODATA;
		used = true;
	}
	if (!used)
		return -EINVAL;
	file = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (file < 0)
		return -errno;
	image->files[image->nr_files++] = file;
	return 0;
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
		ret = read_whole(image->files[first >> CRIUPY_FILE_SHIFT], into, nr << PAGE_SHIFT,
				 (first & PAGE_MASK) << PAGE_SHIFT);
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
static size_t extents_from(const struct part *part, const uint64_t *landmarks, uint64_t key, size_t *end)
{
	size_t low = 0, high = nr_landmarks(part);

	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;

		if (landmarks[middle] <= key)
			low = middle;
		else
			high = middle;
	}
	*end = min_u64(part->begin + ((low + 1) << LANDMARK_SHIFT), part->end);
	return part->begin + (low << LANDMARK_SHIFT);
}

const struct extent *image_extent_of(const struct criupy_image *image, uint64_t page)
{
	const struct part *part = &image->parts[image_kind(image, page)];
	size_t high, low = extents_from(part, part->landmark_firsts, page, &high);

	while (high - low > 1) {
		size_t middle = low + (high - low) / 2;

		if (image->extents[middle].first <= page)
			low = middle;
		else
			high = middle;
	}
	return &image->extents[low];
}

size_t image_extent_after(const struct criupy_image *image, int kind, uint64_t addr)
{
	const struct part *part = &image->parts[kind];
	/* If it is none of these, it is the one where the next landmark is. */
	size_t high, low = extents_from(part, part->landmark_starts, addr, &high);

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
