/* Sums over rows by halving: the last rows are added onto the first, as many as the largest power
 * of two below their number; then the second half onto the first, until one row is left.
 */
#ifndef SHARDPROOF_FOLD_H
#define SHARDPROOF_FOLD_H

#include <stddef.h>

/* x(M, N), strides in elements; out(N,), contiguous. M and N positive. */
struct fold {
    const void *x;
    void *out;
    ptrdiff_t m, n, row, column;
    int is_squared; /* of the squares */
};

/* 0, or -1 if there is no memory. */
int fold_f32(const struct fold *);
int fold_f64(const struct fold *);

#endif
