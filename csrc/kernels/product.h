/* Products of matrices whose order of additions is fixed, whatever the shape, strides and threads.
 *
 * The order: the contraction is cut into leaves (given) and each leaf into blocks of BLOCK steps.
 * A block is one chain of fused multiply-adds from zero, in the order of the contraction. Block
 * results are added left to right, leaf results as the given program says. So an element of a
 * product depends on its own row and column alone, and wide and narrow vectors agree.
 */
#ifndef SHARDPROOF_PRODUCT_H
#define SHARDPROOF_PRODUCT_H

#include <stddef.h>
#include <stdint.h>

enum { BLOCK = 256 }; /* part of the scheme: another value gives other bits */
enum { MAX_LEVELS = 32, MAX_ROWS = 12, MAX_VECTORS = 2 };
enum { MAX_DOTS = 8, MAX_AXPYS = 4, MAX_THIN = 24 /* sums in registers */ };

/* A run of the contraction that is one chain. Its result is pushed on a stack of partial sums
 * after `pops` of them were added onto it from the left, the topmost first. */
struct segment {
    ptrdiff_t start, depth;
    size_t term; /* which it lies in */
    int32_t pops;
    int32_t slot; /* height of the stack below the result */
    int32_t node; /* which output the result is, or -1 */
};

/* A pair of operands, which has some steps of the contraction. Strides in elements. */
struct term {
    const void *a, *b; /* (M, depth), (depth, N) */
    ptrdiff_t first, depth;
    ptrdiff_t a_row, a_col, b_row, b_col;
};

/* out[node](M, N) = the terms' a(M, depth) @ b(depth, N) + bias(N), every `out` contiguous. */
struct product {
    const struct term *terms;
    size_t num_terms;
    const void *bias;
    void *out;
    ptrdiff_t m, n, k; /* k: the depths of all terms */
    const struct segment *segments;
    size_t num_segments;
    int num_nodes, num_levels;
    int num_threads;
};

/* One tile: `rows` rows read in place by broadcasts, times vectors along the columns. */
struct tile {
    const void *a;
    ptrdiff_t a_row, a_k;
    const void *b;
    ptrdiff_t b_k, depth;
    const void *left; /* the topmost partial sum; the next ones lie `level` elements below */
    ptrdiff_t left_row, level;
    int pops;
    void *out;
    ptrdiff_t out_row;
};

typedef void tile_kernel(const struct tile *);

/* What one instruction set has for one type. */
struct tile_set {
    int lanes, max_rows;
    tile_kernel *kernels[MAX_VECTORS][MAX_ROWS]; /* [vectors - 1][rows - 1] */
};

/* Few rows times all columns [first, end), which are at least `lanes`. */
typedef void thin_kernel(const struct product *, ptrdiff_t first, ptrdiff_t end);

struct thin_set {
    int lanes;
    thin_kernel *near[MAX_DOTS], *far[MAX_DOTS]; /* [rows - 1]; a column of b is contiguous */
    thin_kernel *axpys[MAX_AXPYS];               /* [rows - 1]; a row of b is */
};

extern const struct thin_set thin_f32_avx2, thin_f64_avx2, thin_f32_avx512, thin_f64_avx512;
extern const struct tile_set tiles_f32_avx2, tiles_f64_avx2, tiles_f32_avx512, tiles_f64_avx512;

enum path { PATH_NONE, PATH_AVX2, PATH_AVX512 };
enum path widest_path(void);

/* 0, or -1 if there is no memory. Holds no lock and touches no Python. */
int product_f32(const struct product *, enum path);
int product_f64(const struct product *, enum path);

/* At least `size` bytes for this thread, aligned to 64; NULL if there is no memory. They are its
 * own until `release_scratch`, which keeps up to MAX_KEPT of them for the next call. */
void *scratch(size_t size);
void release_scratch(void);
size_t kept_scratch(void); /* bytes that this thread holds */

enum { MAX_KEPT = 8 << 20 };

#endif
