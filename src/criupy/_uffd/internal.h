/* What the files of the native core share and Python never sees. */

#ifndef CRIUPY_INTERNAL_H
#define CRIUPY_INTERNAL_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "criupy.h"

#define PAGE_SHIFT 12

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* ---- codec.c ---------------------------------------------------------------- */

/* Whether a dst_id has a type that a pagemap has. */
bool frame_names_image(uint64_t dst_id);
/* What follows the frame of a GETV, CRIUPY_RUN_LENGTH bytes for each run. */
void run_encode(uint8_t *out, uint64_t address, uint64_t nr_pages);
void run_decode(const uint8_t *in, uint64_t *address, uint64_t *nr_pages);

/* ---- image.c ---------------------------------------------------------------- */

struct extent {
	uint64_t start;		/* dump-time address */
	uint64_t nr_pages;
	uint64_t first;		/* its first page's number in the image */
	uint64_t data;		/* its first page's number in a pages file, and which */
};

/* Where the pages of an extent come from: the source, or pages files. */
enum { REMOTE, LOCAL, NR_KINDS };

/* The extents of a kind, in address order. */
struct part {
	size_t begin, end;
	/* Those of each 64th extent. They lie close together, so a search begins among
	 * them: in the extents themselves each step would miss the caches. */
	uint64_t *landmark_starts, *landmark_firsts;
};

/* Of one extent, by numbers in the image. */
struct run {
	uint64_t page;
	uint64_t nr_pages;
};

struct criupy_image {
	uint64_t id;
	size_t nr_extents;
	struct extent *extents;
	struct part parts[NR_KINDS];	/* of these, remote ones first */
	uint8_t *flags;		/* per extent, NULL when all are 0 */
	uint64_t nr_pages;
	uint64_t first_local;	/* the pages from here on are */
	uint8_t *requested;	/* per page, REQUESTED_*: asked for, not here yet */
	bool has_data;		/* extents[].data is meaningful, for each of them */
	uint32_t nr_files, nr_files_needed;
	int *files;
	struct task *tasks;	/* the pager's address spaces that came from this task */
	struct criupy_image *next;	/* in the pager's list */
};

/* Where a page was asked for, a bit for each lane, or waits to be installed. */
#define REQUESTED_BULK 1
#define REQUESTED_URGENT 2
#define REQUESTED_PARKED 4

void image_mark(struct criupy_image *image, uint64_t page, uint64_t nr, uint8_t requested);
void image_unmark(struct criupy_image *image, uint64_t page, uint64_t nr, uint8_t requested);
/* The extent that page (a number in the image, in range) belongs to. */
const struct extent *image_extent_of(const struct criupy_image *image, uint64_t page);
/* The first extent of a kind that ends after a dump-time address; its part's end if none. */
size_t image_extent_after(const struct criupy_image *image, int kind, uint64_t addr);
/* Read runs of local pages. -ENODATA when a file has become shorter. */
int image_read(const struct criupy_image *image, const struct run *runs, uint32_t nr_runs, uint8_t *into);

/* What kind a page is of. */
static inline int image_kind(const struct criupy_image *image, uint64_t page)
{
	return page >= image->first_local;
}

/* Where the pages of a kind begin and end. */
static inline uint64_t image_kind_begin(const struct criupy_image *image, int kind)
{
	return kind == LOCAL ? image->first_local : 0;
}

static inline uint64_t image_kind_end(const struct criupy_image *image, int kind)
{
	return kind == LOCAL ? image->nr_pages : image->first_local;
}

static inline uint64_t image_address(const struct extent *extent, uint64_t page)
{
	return extent->start + ((page - extent->first) << PAGE_SHIFT);
}

/* ---- translate.c -------------------------------------------------------------- */

struct piece {
	uint64_t key;
	uint64_t value;
	uint64_t length;
};

struct pieces {
	struct piece *items;
	size_t nr;
	size_t room;
};

struct translation {
	struct pieces to_image;		/* key: run-time address, value: dump-time address */
	struct pieces to_runtime;	/* the inverse */
};

int translation_init(struct translation *t);
int translation_copy(struct translation *t, const struct translation *from);
void translation_free(struct translation *t);
/* Look key up; the value, and how far from there the piece goes on. */
bool pieces_find(const struct pieces *pieces, uint64_t key, uint64_t *value, uint64_t *rest);
/* The first piece that ends after key; nr if none. */
size_t pieces_after(const struct pieces *pieces, uint64_t key);
int translation_move(struct translation *t, uint64_t from, uint64_t to, uint64_t length);

/* ---- space.c -------------------------------------------------------------------- */

struct criupy_space {
	struct criupy_image *image;
	struct translation translation;
	uint8_t *state;
	uint64_t nr_missing;
	uint64_t local_missing;		/* of these */
};

/* As criupy_space_next_missing, before end. */
uint64_t space_next_missing(const struct criupy_space *space, uint64_t *page, uint64_t end, uint64_t max,
			    bool any);

static inline uint64_t space_nr_missing(const struct criupy_space *space, int kind)
{
	return kind == LOCAL ? space->local_missing : space->nr_missing - space->local_missing;
}

/* ---- histogram.c ------------------------------------------------------------------ */

void histogram_add(uint64_t *buckets, uint64_t ns);

#endif
