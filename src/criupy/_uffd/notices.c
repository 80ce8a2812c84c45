/* A ring with one writer (the pager's thread) and one reader (Python).
 *
 * head and tail count for ever and are reduced to an index on use. The writer's
 * release of head makes the notice visible before it is counted; the reader's
 * release of tail frees the slot only after it was copied out. */

#include "pager.h"

bool notices_push(struct notices *notices, struct criupy_notice notice)
{
	uint32_t head = atomic_load_explicit(&notices->head, memory_order_relaxed);
	uint32_t tail = atomic_load_explicit(&notices->tail, memory_order_acquire);

	if (head - tail == NOTICE_RING)
		return false;
	notices->ring[head % NOTICE_RING] = notice;
	atomic_store_explicit(&notices->head, head + 1, memory_order_release);
	return true;
}

bool notices_pop(struct notices *notices, struct criupy_notice *notice)
{
	uint32_t tail = atomic_load_explicit(&notices->tail, memory_order_relaxed);
	uint32_t head = atomic_load_explicit(&notices->head, memory_order_acquire);

	if (head == tail)
		return false;
	*notice = notices->ring[tail % NOTICE_RING];
	atomic_store_explicit(&notices->tail, tail + 1, memory_order_release);
	return true;
}
