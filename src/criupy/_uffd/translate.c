/* From run-time to dump-time addresses and back.
 *
 * The source knows a page by the address it had when the task was dumped; the
 * kernel knows it by the address it has now. Only mremap(2) makes the two
 * differ. So the translation starts as one piece, the identity over everything,
 * and each mremap cuts its range out and puts it in again with another offset.
 * munmap and MADV_DONTNEED need no cut: their pages become "removed" in the
 * lazy space, and that says it all.
 *
 * A page is mapped at one place at most, so the translation is one-to-one. It
 * is kept sorted both ways, as two arrays: a look-up is a binary search in an
 * array that has one element until the task calls mremap and a few more per
 * call afterwards. An insertion moves the array's tail, 24 bytes a piece, which
 * at ten thousand live pieces still costs less than the system call that caused
 * it; a tree would make every fault pay for that. */

#include "internal.h"

/* Beyond any user address, so that no sum here can overflow. */
#define ADDRESS_END (UINT64_C(1) << 62)

static int reserve(struct pieces *pieces, size_t more)
{
	size_t room = pieces->room ? pieces->room : 4;
	struct piece *items;

	while (room < pieces->nr + more)
		room *= 2;
	if (room == pieces->room)
		return 0;
	items = realloc(pieces->items, room * sizeof(*items));
	if (!items)
		return -ENOMEM;
	pieces->items = items;
	pieces->room = room;
	return 0;
}

size_t pieces_after(const struct pieces *pieces, uint64_t key)
{
	size_t low = 0, high = pieces->nr;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (pieces->items[middle].key + pieces->items[middle].length > key)
			high = middle;
		else
			low = middle + 1;
	}
	return low;
}

bool pieces_find(const struct pieces *pieces, uint64_t key, uint64_t *value, uint64_t *rest)
{
	size_t i = pieces_after(pieces, key);
	const struct piece *p = pieces->items + i;

	if (i == pieces->nr || p->key > key)
		return false;
	*value = p->value + (key - p->key);
	*rest = p->length - (key - p->key);
	return true;
}

/* Room for one more piece must have been reserved. */
static void cut(struct pieces *pieces, uint64_t start, uint64_t length)
{
	uint64_t end = start + length;
	size_t i = pieces_after(pieces, start), stop;
	struct piece *p = pieces->items + i;

	if (i == pieces->nr || p->key >= end)
		return;
	if (p->key < start) {
		uint64_t head = start - p->key;

		if (p->key + p->length > end) {
			uint64_t skipped = end - p->key;

			memmove(p + 2, p + 1, (pieces->nr - i - 1) * sizeof(*p));
			p[1] = (struct piece){ end, p->value + skipped, p->length - skipped };
			pieces->nr++;
		}
		p->length = head;
		i++;
	}
	for (stop = i; stop < pieces->nr; stop++) {
		uint64_t skipped;

		p = pieces->items + stop;
		if (p->key + p->length <= end)
			continue;
		if (p->key < end) {
			skipped = end - p->key;
			*p = (struct piece){ end, p->value + skipped, p->length - skipped };
		}
		break;
	}
	memmove(pieces->items + i, pieces->items + stop, (pieces->nr - stop) * sizeof(*p));
	pieces->nr -= stop - i;
}

static void insert(struct pieces *pieces, struct piece piece)
{
	size_t i = pieces_after(pieces, piece.key);

	memmove(pieces->items + i + 1, pieces->items + i, (pieces->nr - i) * sizeof(piece));
	pieces->items[i] = piece;
	pieces->nr++;
}

/* Forget where [start, start + length) of run time leads. */
static void forget(struct translation *t, uint64_t start, uint64_t length)
{
	uint64_t end = start + length;
	size_t i = pieces_after(&t->to_image, start);

	for (; i < t->to_image.nr && t->to_image.items[i].key < end; i++) {
		const struct piece *p = &t->to_image.items[i];
		uint64_t low = max_u64(start, p->key), high = min_u64(end, p->key + p->length);

		cut(&t->to_runtime, p->value + (low - p->key), high - low);
	}
	cut(&t->to_image, start, length);
}

int translation_init(struct translation *t)
{
	const struct piece identity = { 0, 0, ADDRESS_END };
	int ret;

	memset(t, 0, sizeof(*t));
	ret = reserve(&t->to_image, 1);
	if (!ret)
		ret = reserve(&t->to_runtime, 1);
	if (ret) {
		translation_free(t);
		return ret;
	}
	insert(&t->to_image, identity);
	insert(&t->to_runtime, identity);
	return 0;
}

int translation_copy(struct translation *t, const struct translation *from)
{
	int ret;

	memset(t, 0, sizeof(*t));
	ret = reserve(&t->to_image, from->to_image.nr);
	if (!ret)
		ret = reserve(&t->to_runtime, from->to_runtime.nr);
	if (ret) {
		translation_free(t);
		return ret;
	}
	memcpy(t->to_image.items, from->to_image.items, from->to_image.nr * sizeof(struct piece));
	memcpy(t->to_runtime.items, from->to_runtime.items, from->to_runtime.nr * sizeof(struct piece));
	t->to_image.nr = from->to_image.nr;
	t->to_runtime.nr = from->to_runtime.nr;
	return 0;
}

void translation_free(struct translation *t)
{
	free(t->to_image.items);
	free(t->to_runtime.items);
	memset(t, 0, sizeof(*t));
}

int translation_move(struct translation *t, uint64_t from, uint64_t to, uint64_t length)
{
	uint64_t end = from + length;
	struct piece *moved;
	size_t first = pieces_after(&t->to_image, from), nr = 0;
	int ret;

	while (first + nr < t->to_image.nr && t->to_image.items[first + nr].key < end)
		nr++;
	/* Everything that can fail comes before anything that changes: two cuts
	 * add at most two pieces (each piece cut in the inverse adds one, too). */
	moved = malloc((nr + 1) * sizeof(*moved));
	if (!moved)
		return -ENOMEM;
	ret = reserve(&t->to_image, nr + 4);
	if (!ret)
		ret = reserve(&t->to_runtime, 3 * nr + t->to_image.nr + 4);
	if (ret)
		goto out;
	for (size_t i = 0; i < nr; i++) {
		const struct piece *p = &t->to_image.items[first + i];
		uint64_t low = max_u64(from, p->key), high = min_u64(end, p->key + p->length);

		moved[i] = (struct piece){ low - from + to, p->value + (low - p->key), high - low };
	}
	forget(t, from, length);
	forget(t, to, length);
	for (size_t i = 0; i < nr; i++) {
		insert(&t->to_image, moved[i]);
		insert(&t->to_runtime, (struct piece){ moved[i].value, moved[i].key, moved[i].length });
	}
out:
	free(moved);
	return ret;
}
