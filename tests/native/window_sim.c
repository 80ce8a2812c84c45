/* The window for two lanes over a simulated link: both lanes share its bandwidth,
 * background is asked for all the time, and now and then a fault asks for a page.
 *
 * window_sim MEGABYTES_PER_S ROUND_TRIP_US SEED WHAT, WHAT being
 *   calm     replies come when they are due
 *   noisy    a reply is noticed late, by up to 0.4 ms, the first one by 8 ms, and now
 *            and then one by up to 10 ms
 *   longer   midway the round trip becomes twice as long
 *   slower   midway the bandwidth becomes a quarter
 *   faster   midway the bandwidth becomes four times as much
 *
 * Prints, of the last quarter, which part of the bandwidth background had, and how
 * many round trips a fault waited: in the median, at the 99th percentile, at most;
 * then which part background had in the third second. */

#include <stdio.h>

#include "pager.h"

#define SECOND UINT64_C(1000000000)
#define LENGTH (32 * SECOND)
/* As a machine's clock that has run for some time. */
#define CLOCK(ns) ((ns) + 1000 * SECOND)
#define COUNTED (LENGTH * 3 / 4)
#define SOON (2 * SECOND)
#define FAULT_EVERY (7 * SECOND / 1000)
#define MAX_REQUESTS (1u << 16)

struct reply {
	uint64_t sent_ns, header_ns, end_ns, nr_pages;
};

static uint64_t seed, free_ns, round_trip_ns;
static double bytes_per_ns;
static struct reply replies[MAX_REQUESTS];
static size_t first, nr;

static double random_unit(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return (double)((seed >> 11) + 1) / 9007199254740993.0;
}

/* When the first and the last byte of a reply to what is asked for now arrive. */
static void ask(uint64_t now, uint64_t nr_pages, uint64_t *header, uint64_t *end)
{
	uint64_t departs = max_u64(now + round_trip_ns / 2, free_ns);

	free_ns = departs + (uint64_t)((double)(nr_pages << PAGE_SHIFT) / bytes_per_ns);
	*header = departs + round_trip_ns / 2;
	*end = free_ns + round_trip_ns / 2;
}

static int by_size(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	static uint64_t waits[LENGTH / FAULT_EVERY + 1];
	uint64_t outstanding = 0, received = 0, next_fault = FAULT_EVERY, now = 0, counted_ns = 0;
	bool noisy, is_first = true, changed = false, header_seen = false;
	size_t nr_waits = 0;
	double soon = 0;
	struct window window = { 0 };

	if (argc != 5)
		return 2;
	bytes_per_ns = atof(argv[1]) / 1e3;
	round_trip_ns = (uint64_t)(atof(argv[2]) * 1e3);
	seed = strtoull(argv[3], NULL, 0) * 2654435761u + 1;
	noisy = !strcmp(argv[4], "noisy");
	window_init(&window, 0, 128);
	window_begin(&window, CLOCK(now));
	while (now < LENGTH) {
		struct reply *r;
		uint64_t room, due;

		if (!changed && now >= LENGTH / 2) {
			changed = true;
			if (!strcmp(argv[4], "longer"))
				round_trip_ns *= 2;
			else if (!strcmp(argv[4], "slower"))
				bytes_per_ns /= 4;
			else if (!strcmp(argv[4], "faster"))
				bytes_per_ns *= 4;
		}
		while (nr < MAX_REQUESTS && (room = window_room(&window, CLOCK(now), outstanding, nr))) {
			r = &replies[(first + nr) % MAX_REQUESTS];
			*r = (struct reply){ .sent_ns = now, .nr_pages = room };
			ask(now, room, &r->header_ns, &r->end_ns);
			outstanding += room;
			nr++;
		}
		r = &replies[first];
		due = max_u64(header_seen ? r->end_ns : r->header_ns, now);
		if (next_fault < due) {
			uint64_t header, end;

			window_demand(&window, CLOCK(now));
			ask(next_fault, 1, &header, &end);
			if (next_fault > COUNTED)
				waits[nr_waits++] = end - next_fault;
			next_fault += (uint64_t)((double)FAULT_EVERY * (0.5 + random_unit()));
			continue;
		}
		now = due;
		if (!header_seen) {
			if (noisy) {
				now += (uint64_t)(400000 * random_unit());
				if (random_unit() < 0.005 || is_first)
					now += (uint64_t)(10000000 * (is_first ? 0.8 : random_unit()));
				is_first = false;
			}
			window_reply_begins(&window, CLOCK(now), CLOCK(r->sent_ns), true);
			header_seen = true;
			continue;
		}
		window_received(&window, r->nr_pages << PAGE_SHIFT);
		header_seen = false;
		outstanding -= r->nr_pages;
		if (now > SOON && now <= SOON + SECOND)
			soon += (double)(r->nr_pages << PAGE_SHIFT) / bytes_per_ns;
		if (counted_ns)
			received += r->nr_pages << PAGE_SHIFT;
		else if (now > COUNTED)
			counted_ns = now;
		first = (first + 1) % MAX_REQUESTS;
		nr--;
	}
	qsort(waits, nr_waits, sizeof(waits[0]), by_size);
	printf("%.4f %.3f %.3f %.3f %.4f\n", (double)received / (double)(now - counted_ns) / bytes_per_ns,
	       (double)waits[nr_waits / 2] / (double)round_trip_ns,
	       (double)waits[nr_waits * 99 / 100] / (double)round_trip_ns,
	       (double)waits[nr_waits - 1] / (double)round_trip_ns, soon / (double)SECOND);
	return 0;
}
