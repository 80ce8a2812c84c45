/* What the generated module includes: the declarations that it was generated from. */
#include <stddef.h>
#include <stdint.h>

#include "criupy.h"
