/* The lazy space: which pages one address space still needs, and where.
 *
 * A page is found in two steps. The translation turns the address the kernel
 * speaks of into the dump-time address (one comparison until the task calls
 * mremap); a binary search in the image's extents, which never change, turns
 * that into the page's number. The number indexes one byte of state. Nothing
 * here ever walks a list: a look-up is O(log extents), an event O(log extents)
 * plus one byte per page that it covers.
 *
 * "In flight" is no state of its own but a missing page that was asked for
 * (image.c says why). That makes the life of a page simple: only an installed
 * page becomes present, so a reply that has to be thrown away loses nothing. */

#include "internal.h"

int criupy_space_create(struct criupy_space **space, struct criupy_image *image)
{
	struct criupy_space *s = calloc(1, sizeof(*s));
	int ret = -ENOMEM;

	if (!s)
		return -ENOMEM;
	s->image = image;
	s->state = calloc(image->nr_pages + 1, 1);
	if (s->state)
		ret = translation_init(&s->translation);
	if (ret) {
		criupy_space_destroy(s);
		return ret;
	}
	s->nr_missing = image->nr_pages;
	s->local_missing = image->nr_pages - image->first_local;
	*space = s;
	return 0;
}

int criupy_space_fork(const struct criupy_space *parent, struct criupy_space **child)
{
	const struct criupy_image *image = parent->image;
	struct criupy_space *s = calloc(1, sizeof(*s));
	int ret = -ENOMEM;

	if (!s)
		return -ENOMEM;
	s->image = parent->image;
	s->state = malloc(image->nr_pages + 1);
	if (s->state)
		ret = translation_copy(&s->translation, &parent->translation);
	if (ret) {
		criupy_space_destroy(s);
		return ret;
	}
	memcpy(s->state, parent->state, image->nr_pages);
	s->nr_missing = parent->nr_missing;
	s->local_missing = parent->local_missing;
	if (image->flags) {
		for (size_t i = 0; i < image->nr_extents; i++)
			if (image->flags[i] & CRIUPY_EXTENT_NOT_INHERITED)
				criupy_space_set(s, image->extents[i].first, image->extents[i].nr_pages,
						 CRIUPY_PAGE_REMOVED);
	}
	*child = s;
	return 0;
}

void criupy_space_destroy(struct criupy_space *space)
{
	if (!space)
		return;
	translation_free(&space->translation);
	free(space->state);
	free(space);
}

/* The extent that holds a dump-time address, NULL if none does. */
static const struct extent *extent_at(const struct criupy_image *image, uint64_t img_addr)
{
	for (int kind = 0; kind < NR_KINDS; kind++) {
		size_t i = image_extent_after(image, kind, img_addr);

		if (i != image->parts[kind].end && image->extents[i].start <= img_addr)
			return &image->extents[i];
	}
	return NULL;
}

int criupy_space_lookup(const struct criupy_space *space, uint64_t addr, uint64_t *page)
{
	const struct extent *e;
	uint64_t img_addr, rest;

	if (!pieces_find(&space->translation.to_image, addr, &img_addr, &rest))
		return CRIUPY_PAGE_NONE;
	e = extent_at(space->image, img_addr);
	if (!e)
		return CRIUPY_PAGE_NONE;
	*page = e->first + ((img_addr - e->start) >> PAGE_SHIFT);
	if (space->state[*page] == CRIUPY_PAGE_MISSING && space->image->requested[*page])
		return CRIUPY_PAGE_IN_FLIGHT;
	return space->state[*page];
}

int criupy_space_locate(const struct criupy_space *space, uint64_t page, uint64_t *addr, uint64_t *nr)
{
	const struct extent *e;
	uint64_t rest;

	if (page >= space->image->nr_pages)
		return -ENOENT;
	e = image_extent_of(space->image, page);
	if (!pieces_find(&space->translation.to_runtime, image_address(e, page), addr, &rest))
		return -ENOENT;
	*nr = min_u64(*nr, min_u64(rest >> PAGE_SHIFT, e->first + e->nr_pages - page));
	return 0;
}

void criupy_space_set(struct criupy_space *space, uint64_t page, uint64_t nr, int state)
{
	uint64_t before = 0, local = space->image->first_local;
	uint8_t *s = space->state + page;

	if (page < local && page + nr > local) {
		criupy_space_set(space, local, page + nr - local, state);
		nr = local - page;
	}
	for (uint64_t i = 0; i < nr; i++)
		before += s[i] == CRIUPY_PAGE_MISSING;
	memset(s, state, nr);
	space->nr_missing -= before;
	if (state == CRIUPY_PAGE_MISSING)
		space->nr_missing += nr;
	if (page < local)
		return;
	space->local_missing -= before;
	if (state == CRIUPY_PAGE_MISSING)
		space->local_missing += nr;
}

/* The pages of the image in [start, end) of dump time are gone from this space. */
static void remove_image_range(struct criupy_space *space, uint64_t start, uint64_t end)
{
	const struct criupy_image *image = space->image;

	for (int kind = 0; kind < NR_KINDS; kind++) {
		size_t i = image_extent_after(image, kind, start);

		for (; i < image->parts[kind].end && image->extents[i].start < end; i++) {
			const struct extent *e = &image->extents[i];
			uint64_t low = max_u64(start, e->start);
			uint64_t high = min_u64(end, e->start + (e->nr_pages << PAGE_SHIFT));

			criupy_space_set(space, e->first + ((low - e->start) >> PAGE_SHIFT),
					 (high - low) >> PAGE_SHIFT, CRIUPY_PAGE_REMOVED);
		}
	}
}

int64_t criupy_space_remove(struct criupy_space *space, uint64_t start, uint64_t length)
{
	const struct pieces *pieces = &space->translation.to_image;
	uint64_t before = space->nr_missing, end = start + length;
	size_t i = pieces_after(pieces, start);

	if (end < start)
		return -EINVAL;
	for (; i < pieces->nr && pieces->items[i].key < end; i++) {
		const struct piece *p = &pieces->items[i];
		uint64_t low = max_u64(start, p->key), high = min_u64(end, p->key + p->length);

		remove_image_range(space, p->value + (low - p->key), p->value + (high - p->key));
	}
	return (int64_t)(before - space->nr_missing);
}

int criupy_space_remap(struct criupy_space *space, uint64_t from, uint64_t to, uint64_t length)
{
	if (from + length < from || to + length < to)
		return -EINVAL;
	if (from == to || !length)
		return 0;
	/* mremap onto a mapping unmaps it; the kernel tells of that first. Should
	 * it not have, the pages that were there must not be looked for: all of
	 * the target but what is on its way out of it. */
	if (to + length <= from || from + length <= to)
		criupy_space_remove(space, to, length);
	else if (to > from)
		criupy_space_remove(space, from + length, to - from);
	else
		criupy_space_remove(space, to, from - to);
	return translation_move(&space->translation, from, to, length);
}

uint64_t criupy_space_nr_missing(const struct criupy_space *space)
{
	return space->nr_missing;
}

uint64_t criupy_space_next_missing(const struct criupy_space *space, uint64_t *page, uint64_t max, int any)
{
	return space_next_missing(space, page, space->image->nr_pages, max, any);
}

uint64_t space_next_missing(const struct criupy_space *space, uint64_t *page, uint64_t end, uint64_t max, bool any)
{
	const struct criupy_image *image = space->image;
	const uint8_t *state = space->state, *requested = image->requested;
	uint64_t p = *page, nr;
	const struct extent *e;

	for (;; p++) {
		const uint8_t *found = p < end ? memchr(state + p, CRIUPY_PAGE_MISSING, end - p) : NULL;

		if (!found)
			return 0;
		p = (uint64_t)(found - state);
		if (any || !requested[p])
			break;
	}
	e = image_extent_of(image, p);
	end = min_u64(e->first + e->nr_pages - p, max);
	for (nr = 1; nr < end; nr++)
		if (state[p + nr] != CRIUPY_PAGE_MISSING || (!any && requested[p + nr]))
			break;
	*page = p;
	return nr;
}
