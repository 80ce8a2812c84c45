/* What a lane was asked for and has not answered yet.
 *
 * Two rings, one of requests and one of their runs, because a source answers in
 * order: both are appended to and taken from at the front together. */

#include "pager.h"

static int ring_reserve(struct ring *ring, size_t more, size_t size)
{
	size_t room = ring->room ? ring->room : 64;
	uint8_t *items;

	if (ring->nr + more <= ring->room)
		return 0;
	while (room < ring->nr + more)
		room *= 2;
	items = malloc(room * size);
	if (!items)
		return -ENOMEM;
	for (size_t i = 0; i < ring->nr; i++)
		memcpy(items + i * size,
		       (uint8_t *)ring->items + ((ring->first + i) & (ring->room - 1)) * size, size);
	free(ring->items);
	ring->items = items;
	ring->first = 0;
	ring->room = room;
	return 0;
}

static void ring_drop(struct ring *ring, size_t nr)
{
	ring->first = (ring->first + nr) & (ring->room - 1);
	ring->nr -= nr;
}

struct request *lane_request_first(const struct lane *l)
{
	return (struct request *)l->requests.items + l->requests.first;
}

const struct run *lane_run(const struct lane *l, uint32_t i)
{
	return (const struct run *)l->runs.items + ((l->runs.first + i) & (l->runs.room - 1));
}

static uint64_t address_of(const struct criupy_image *image, const struct run *run)
{
	return image_address(image_extent_of(image, run->page), run->page);
}

/* A frame and what follows it go out together, or not at all. */
static int put_request(struct lane *l, struct criupy_image *image, const struct run *runs, uint32_t nr_runs,
		       uint64_t nr_pages)
{
	uint8_t out[CRIUPY_FRAME_32 + CRIUPY_MAX_RUNS * CRIUPY_RUN_LENGTH];
	struct criupy_frame frame = { .nr_pages = nr_pages, .dst_id = image->id };
	size_t length = l->frame_size;

	if (nr_runs == 1) {
		frame.cmd = CRIUPY_CMD_GET;
		frame.vaddr = address_of(image, runs);
	} else {
		frame.cmd = CRIUPY_CMD_GETV;
		frame.vaddr = nr_runs;
		for (uint32_t i = 0; i < nr_runs; i++) {
			run_encode(out + length, address_of(image, &runs[i]), runs[i].nr_pages);
			length += CRIUPY_RUN_LENGTH;
		}
	}
	(void)criupy_frame_encode(&frame, out, l->frame_size);
	return lane_put(l, out, length);
}

int lane_request(struct criupy_pager *p, struct lane *l, struct criupy_image *image,
		 const struct run *runs, uint32_t nr_runs, bool demand)
{
	uint64_t nr_pages = 0;
	struct request *requests;
	struct run *ours;
	int ret;

	for (uint32_t i = 0; i < nr_runs; i++)
		nr_pages += runs[i].nr_pages;
	ret = ring_reserve(&l->requests, 1, sizeof(*requests));
	if (!ret)
		ret = ring_reserve(&l->runs, nr_runs, sizeof(*ours));
	if (!ret)
		ret = put_request(l, image, runs, nr_runs, nr_pages);
	if (ret) {
		pager_fail(p, -ret);
		return ret;
	}
	if (!l->requests.nr)
		l->heard_ns = p->now_ns;
	requests = l->requests.items;
	requests[(l->requests.first + l->requests.nr) & (l->requests.room - 1)] = (struct request){
		.image = image,
		.nr_pages = nr_pages,
		.nr_runs = nr_runs,
		.sent_ns = p->now_ns,
		.demand = demand,
	};
	l->requests.nr++;
	ours = l->runs.items;
	for (uint32_t i = 0; i < nr_runs; i++) {
		ours[(l->runs.first + l->runs.nr) & (l->runs.room - 1)] = runs[i];
		l->runs.nr++;
		image_mark(image, runs[i].page, runs[i].nr_pages, l->requested);
	}
	l->nr_outstanding += nr_pages;
	p->stats.nr_outstanding += nr_pages;
	p->stats.nr_requests++;
	p->stats.nr_demand_requests += demand;
	if (demand) {
		busy_poll(p);
		window_demand(&p->window, p->now_ns);
	}
	return 0;
}

void lane_request_came(struct criupy_pager *p, struct lane *l, uint64_t nr_pages, struct buffer *b)
{
	struct request *r = lane_request_first(l);
	uint64_t skip = r->nr_came, left = nr_pages;

	b->image = r->image;
	b->demand = r->demand;
	b->local = b->unread = false;
	b->nr_pages = nr_pages;
	b->nr_runs = 0;
	for (uint32_t i = 0; left; i++) {
		const struct run *run = lane_run(l, i);
		uint64_t nr;

		if (skip >= run->nr_pages) {
			skip -= run->nr_pages;
			continue;
		}
		nr = min_u64(run->nr_pages - skip, left);
		b->runs[b->nr_runs++] = (struct run){ run->page + skip, nr };
		image_unmark(r->image, run->page + skip, nr, l->requested);
		left -= nr;
		skip = 0;
	}
	r->nr_came += nr_pages;
	l->nr_outstanding -= nr_pages;
	p->stats.nr_outstanding -= nr_pages;
}

void lane_request_pop(struct criupy_pager *p, struct lane *l)
{
	const struct request *r = lane_request_first(l);
	uint64_t came = r->nr_came;

	for (uint32_t i = 0; i < r->nr_runs; i++) {
		const struct run *run = lane_run(l, i);
		uint64_t skip = min_u64(came, run->nr_pages);

		image_unmark(r->image, run->page + skip, run->nr_pages - skip, l->requested);
		came -= skip;
	}
	l->nr_outstanding -= r->nr_pages - r->nr_came;
	p->stats.nr_outstanding -= r->nr_pages - r->nr_came;
	ring_drop(&l->runs, r->nr_runs);
	ring_drop(&l->requests, 1);
}

void lane_requests_cancel(struct criupy_pager *p, struct lane *l)
{
	while (l->requests.nr)
		lane_request_pop(p, l);
}
