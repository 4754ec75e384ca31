/* The kernels of tiles and of few rows, for each type and instruction set. */
#include "product.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "transposed.h"

#define REAL float
#define VEC __m512
#define LANES 16
#define ROWS 12
#define ZERO _mm512_setzero_ps
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define SPLAT(p) _mm512_set1_ps(*(p))
#define FMA _mm512_fmadd_ps
#define ADD _mm512_add_ps
#define TARGET target("avx512f")
#define NAME(x) x##_f32_avx512
#include "tile.inc"
#include "thin.inc"

#define REAL double
#define VEC __m512d
#define LANES 8
#define ROWS 12
#define ZERO _mm512_setzero_pd
#define LOAD _mm512_loadu_pd
#define STORE _mm512_storeu_pd
#define SPLAT(p) _mm512_set1_pd(*(p))
#define FMA _mm512_fmadd_pd
#define ADD _mm512_add_pd
#define TARGET target("avx512f")
#define NAME(x) x##_f64_avx512
#include "tile.inc"
#include "thin.inc"

#define REAL float
#define VEC __m256
#define LANES 8
#define ROWS 6
#define ZERO _mm256_setzero_ps
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define SPLAT(p) _mm256_broadcast_ss(p)
#define FMA _mm256_fmadd_ps
#define ADD _mm256_add_ps
#define TARGET target("avx2,fma")
#define NAME(x) x##_f32_avx2
#include "tile.inc"
#include "thin.inc"

#define REAL double
#define VEC __m256d
#define LANES 4
#define ROWS 6
#define ZERO _mm256_setzero_pd
#define LOAD _mm256_loadu_pd
#define STORE _mm256_storeu_pd
#define SPLAT(p) _mm256_broadcast_sd(p)
#define FMA _mm256_fmadd_pd
#define ADD _mm256_add_pd
#define TARGET target("avx2,fma")
#define NAME(x) x##_f64_avx2
#include "tile.inc"
#include "thin.inc"

enum path widest_path(void) {
    if (__builtin_cpu_supports("avx512f")) return PATH_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return PATH_AVX2;
    return PATH_NONE;
}
#else
enum path widest_path(void) { return PATH_NONE; }
#endif
