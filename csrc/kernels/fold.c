/* The fold, eight rows at a time: each pass reads every number once and writes an eighth. */
#include "fold.h"

#include <stdlib.h>
#include <string.h>

enum { FAN = 8, BLOCK_BYTES = 256 << 10 };

/* The largest power of two below `rows`, twice: 1 for one row. */
static ptrdiff_t next_power(ptrdiff_t rows) {
    ptrdiff_t power = 1;
    while (power < rows) power *= 2;
    return power;
}

static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

#define REAL float
#define NAME(x) x##_f32
#include "fold.inc"

#define REAL double
#define NAME(x) x##_f64
#include "fold.inc"
