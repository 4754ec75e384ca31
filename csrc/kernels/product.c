/* Which operand is packed, how the work is cut into blocks and threads; both types. */
#define _GNU_SOURCE
#include "product.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum {
    ROW_TILES = 8,            /* of a block: its partial sums and its rows stay in the L2 cache */
    PANELS = 8,               /* of a block */
    PACKED_BYTES = 2 << 20,   /* of a block, if that is more than one panel */
    WORK_OF_A_THREAD = 4 << 20, /* multiply-adds that are worth starting a thread */
    MAX_THREADS = 256,
    FAR_BYTES = 16 << 20, /* of an operand that will be in no cache */
    SHORT = 64            /* contraction in which writing the output is most of the work */
};

static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

/* `parts` even runs of [0, size): the start of run `index`. */
static ptrdiff_t share(ptrdiff_t size, int parts, int index) {
    return size / parts * index + least(index, size % parts);
}

/* Threads that pay, at most one for each of `pieces`. */
static int count_threads(const struct product *p, ptrdiff_t pieces) {
    const double work = (double)p->m * (double)p->n * (double)p->k / WORK_OF_A_THREAD;
    const ptrdiff_t paying = work < MAX_THREADS ? 1 + (ptrdiff_t)work : MAX_THREADS;
    return (int)least(least(p->num_threads, MAX_THREADS), least(pieces, paying));
}

/* Calls `run` with each of `count` parts: the first here, the others in threads of their own. */
static void run_parts(void *(*run)(void *), void *parts, size_t size, int count) {
    pthread_t threads[MAX_THREADS];
    int has_started[MAX_THREADS];
    for (int i = 1; i < count; i++)
        has_started[i] = !pthread_create(threads + i, NULL, run, (char *)parts + i * size);
    run(parts);
    for (int i = 1; i < count; i++) {
        if (has_started[i])
            pthread_join(threads[i], NULL);
        else
            run((char *)parts + i * size);
    }
}

struct thin_part {
    const struct product *p;
    thin_kernel *kernel;
    ptrdiff_t first, end;
};

static void *run_thin(void *given) {
    const struct thin_part *part = given;
    part->kernel(part->p, part->first, part->end);
    return NULL;
}

#define REAL float
#define NAME(x) x##_f32
#define TILES_AVX2 tiles_f32_avx2
#define TILES_AVX512 tiles_f32_avx512
#define THIN_AVX2 thin_f32_avx2
#define THIN_AVX512 thin_f32_avx512
#define SQUARE 8
#define TWO_HALVES(high, low) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1)
/* Eight by eight: rows of `from` to columns of `to`. */
__attribute__((target("avx2"))) static inline void
transpose_square_f32(float *to, ptrdiff_t to_row, const float *from, ptrdiff_t from_row) {
    __m256 r[8], s[8];
    for (int i = 0; i < 4; i++) {
        const float *low = from + i * from_row, *high = from + (i + 4) * from_row;
        r[i] = TWO_HALVES(high, low);
        r[i + 4] = TWO_HALVES(high + 4, low + 4);
    }
    for (int h = 0; h < 8; h += 4) {
        s[h] = _mm256_unpacklo_ps(r[h], r[h + 1]);
        s[h + 1] = _mm256_unpackhi_ps(r[h], r[h + 1]);
        s[h + 2] = _mm256_unpacklo_ps(r[h + 2], r[h + 3]);
        s[h + 3] = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
        _mm256_storeu_ps(to + h * to_row, _mm256_shuffle_ps(s[h], s[h + 2], 0x44));
        _mm256_storeu_ps(to + (h + 1) * to_row, _mm256_shuffle_ps(s[h], s[h + 2], 0xEE));
        _mm256_storeu_ps(to + (h + 2) * to_row, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0x44));
        _mm256_storeu_ps(to + (h + 3) * to_row, _mm256_shuffle_ps(s[h + 1], s[h + 3], 0xEE));
    }
}
#undef TWO_HALVES
#include "product.inc"

#define REAL double
#define NAME(x) x##_f64
#define TILES_AVX2 tiles_f64_avx2
#define TILES_AVX512 tiles_f64_avx512
#define THIN_AVX2 thin_f64_avx2
#define THIN_AVX512 thin_f64_avx512
#define SQUARE 4
/* Four by four: rows of `from` to columns of `to`. */
__attribute__((target("avx2"))) static inline void
transpose_square_f64(double *to, ptrdiff_t to_row, const double *from, ptrdiff_t from_row) {
    const __m256d r0 = _mm256_loadu_pd(from), r1 = _mm256_loadu_pd(from + from_row);
    const __m256d r2 = _mm256_loadu_pd(from + 2 * from_row);
    const __m256d r3 = _mm256_loadu_pd(from + 3 * from_row);
    const __m256d s0 = _mm256_unpacklo_pd(r0, r1), s1 = _mm256_unpackhi_pd(r0, r1);
    const __m256d s2 = _mm256_unpacklo_pd(r2, r3), s3 = _mm256_unpackhi_pd(r2, r3);
    _mm256_storeu_pd(to, _mm256_permute2f128_pd(s0, s2, 0x20));
    _mm256_storeu_pd(to + to_row, _mm256_permute2f128_pd(s1, s3, 0x20));
    _mm256_storeu_pd(to + 2 * to_row, _mm256_permute2f128_pd(s0, s2, 0x31));
    _mm256_storeu_pd(to + 3 * to_row, _mm256_permute2f128_pd(s1, s3, 0x31));
}
#include "product.inc"

#else
int product_f32(const struct product *p, enum path path) { (void)p; (void)path; return -1; }
int product_f64(const struct product *p, enum path path) { (void)p; (void)path; return -1; }
#endif
