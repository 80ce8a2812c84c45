/* A log-linear histogram: below 16 ns a bucket each, then 16 to each power of
 * two, so a percentile read from it is at most 1/16 off. */

#include "internal.h"

int criupy_histogram_bucket(uint64_t ns)
{
	int power, bucket;

	if (ns < 16)
		return (int)ns;
	power = 63 - __builtin_clzll(ns);
	bucket = (power - 3) * 16 + (int)(ns >> (power - 4) & 15);
	return bucket < CRIUPY_NR_BUCKETS ? bucket : CRIUPY_NR_BUCKETS - 1;
}

void histogram_add(uint64_t *buckets, uint64_t ns)
{
	buckets[criupy_histogram_bucket(ns)]++;
}
