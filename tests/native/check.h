/* How the drivers fail: at once, with the place and what errno says. */

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                            \
	do {                                                                        \
		if (!(condition)) {                                                 \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__,      \
				#condition, strerror(errno));                       \
			_exit(1);                                                   \
		}                                                                   \
	} while (0)
