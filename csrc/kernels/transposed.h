/* LANES rows of LANES numbers in memory, to as many vectors that each hold a column of them.
 *
 * Halves of two rows are put together while they are loaded, which spares shuffles; a row's two
 * halves are loaded one after the other, for rows may lie so that a cache keeps few at once.
 */
#ifndef SHARDPROOF_TRANSPOSED_H
#define SHARDPROOF_TRANSPOSED_H

#include <immintrin.h>
#include <stddef.h>

#define TRANSPOSED(target_) __attribute__((always_inline, target(target_))) static inline void

#define TWO_HALVES_F32(low, high)                                                             \
    _mm512_castpd_ps(_mm512_insertf64x4(                                                      \
        _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(low))),                       \
        _mm256_castps_pd(_mm256_loadu_ps(high)), 1))

TRANSPOSED("avx512f") load_transposed_f32_avx512(__m512 *to, const float *from, ptrdiff_t row) {
    __m512 r[16], s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const float *low = from + i * row, *high = low + 8 * row;
        r[i] = TWO_HALVES_F32(low, high);
        r[8 + i] = TWO_HALVES_F32(low + 8, high + 8);
    }
#pragma GCC unroll 2
    for (int k = 0; k < 16; k += 8) {
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            const __m512 *q = r + k + i;
            const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(q[0], q[1]));
            const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(q[0], q[1]));
            const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(q[2], q[3]));
            const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(q[2], q[3]));
            s[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            s[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            s[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            s[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) { /* quarters: of rows 0-3 or 4-7, then of 8-11 or 12-15 */
            const __m512 even = _mm512_shuffle_f32x4(s[j], s[4 + j], 0x88);
            const __m512 odd = _mm512_shuffle_f32x4(s[j], s[4 + j], 0xDD);
            to[k + j] = _mm512_shuffle_f32x4(even, even, 0xD8);
            to[k + 4 + j] = _mm512_shuffle_f32x4(odd, odd, 0xD8);
        }
    }
}

TRANSPOSED("avx512f") load_transposed_f64_avx512(__m512d *to, const double *from, ptrdiff_t row) {
    __m512d r[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const double *low = from + i * row, *high = low + 4 * row;
        r[i] = _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(low)),
                                  _mm256_loadu_pd(high), 1);
        r[4 + i] = _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(low + 4)),
                                      _mm256_loadu_pd(high + 4), 1);
    }
#pragma GCC unroll 2
    for (int k = 0; k < 8; k += 4) {
        const __m512d *q = r + k;
        const __m512d a = _mm512_unpacklo_pd(q[0], q[1]), b = _mm512_unpackhi_pd(q[0], q[1]);
        const __m512d c = _mm512_unpacklo_pd(q[2], q[3]), d = _mm512_unpackhi_pd(q[2], q[3]);
        const __m512d even[] = {_mm512_shuffle_f64x2(a, c, 0x88), _mm512_shuffle_f64x2(b, d, 0x88)};
        const __m512d odd[] = {_mm512_shuffle_f64x2(a, c, 0xDD), _mm512_shuffle_f64x2(b, d, 0xDD)};
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) { /* quarters: of rows 0-1, 4-5, 2-3, 6-7 */
            to[k + j] = _mm512_shuffle_f64x2(even[j], even[j], 0xD8);
            to[k + 2 + j] = _mm512_shuffle_f64x2(odd[j], odd[j], 0xD8);
        }
    }
}

#undef TWO_HALVES_F32

#define TWO_HALVES_F32(high, low) \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1)
#define TWO_HALVES_F64(high, low) \
    _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(low)), _mm_loadu_pd(high), 1)

TRANSPOSED("avx2") load_transposed_f32_avx2(__m256 *to, const float *from, ptrdiff_t row) {
#pragma GCC unroll 2
    for (int k = 0; k < 8; k += 4, from += 4) {
        const float *high = from + 4 * row;
        const __m256 r0 = TWO_HALVES_F32(high, from);
        const __m256 r1 = TWO_HALVES_F32(high + row, from + row);
        const __m256 r2 = TWO_HALVES_F32(high + 2 * row, from + 2 * row);
        const __m256 r3 = TWO_HALVES_F32(high + 3 * row, from + 3 * row);
        const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
        const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
        const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
        const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
        to[k] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
        to[k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
        to[k + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
        to[k + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
    }
}

TRANSPOSED("avx2") load_transposed_f64_avx2(__m256d *to, const double *from, ptrdiff_t row) {
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2, from += 2) {
        const double *high = from + 2 * row;
        const __m256d r0 = TWO_HALVES_F64(high, from);
        const __m256d r1 = TWO_HALVES_F64(high + row, from + row);
        to[k] = _mm256_unpacklo_pd(r0, r1);
        to[k + 1] = _mm256_unpackhi_pd(r0, r1);
    }
}

#undef TWO_HALVES_F32
#undef TWO_HALVES_F64
#undef TRANSPOSED

#endif
