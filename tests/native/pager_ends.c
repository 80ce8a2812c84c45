/* Restores of several small tasks from a pages file, with copiers: whichever thread
 * brings the last page of each, all of them end.
 *
 * pager_ends ROUNDS */

#include "filled.h"

#define NR_TASKS 12
#define NR_PAGES 64

int main(int argc, char **argv)
{
	int file = filled_file(NR_PAGES);

	if (argc != 2)
		return 2;
	alarm(60);
	for (int round = 0; round < atoi(argv[1]); round++) {
		void *memory[NR_TASKS];
		struct criupy_pager *pager;
		struct criupy_stats stats;
		int restore;

		CHECK(!criupy_pager_create(&pager, &filled_config));
		for (int i = 0; i < NR_TASKS; i++)
			memory[i] = filled_task(pager, i + 1, file, NR_PAGES);
		restore = filled_finish(pager);
		do {
			usleep(200);
			criupy_pager_snapshot(pager, &stats);
		} while (stats.phase != CRIUPY_PHASE_ENDED);
		CHECK(stats.outcome == CRIUPY_OUTCOME_COMPLETE && stats.pages_background == NR_TASKS * NR_PAGES);
		criupy_pager_destroy(pager);
		close(restore);
		for (int i = 0; i < NR_TASKS; i++)
			munmap(memory[i], (size_t)NR_PAGES * CRIUPY_PAGE_SIZE);
	}
	return 0;
}
