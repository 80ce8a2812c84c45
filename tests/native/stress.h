/* What the two halves of the stress test agree on. */

#define NR_SLICES 3
#define SLICE_PAGES 1024
#define EXIT_POISONED 42
