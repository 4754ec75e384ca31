/* Additions. Every one rounds as `left + right` of the same dtype does; 16 bits are added in
 * float, and rounded, to nearest even, when `narrow` is called. */
#include "core.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_F16C 1
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && defined(__GLIBC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORISED
#endif

/* `out` may be `left` or `right`: element by element, that does no harm. */
#define DEFINE_ADD(name, type)                                                        \
    VECTORISED static void add_##name(void *out, const void *left, const void *right, \
                                      size_t count)                                   \
    {                                                                                 \
        type *z = out;                                                                \
        const type *x = left, *y = right;                                             \
        _Pragma("GCC ivdep") for (size_t i = 0; i < count; i++) z[i] = (type)(x[i] + y[i]); \
    }

DEFINE_ADD(f32, float)
DEFINE_ADD(f64, double)
DEFINE_ADD(u8, uint8_t) /* unsigned, so that it wraps around */
DEFINE_ADD(u16, uint16_t)
DEFINE_ADD(u32, uint32_t)
DEFINE_ADD(u64, uint64_t)

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

VECTORISED static void widen_bf16(void *out, const void *in, size_t count)
{
    uint32_t *z = out;
    const uint16_t *x = in;
    for (size_t i = 0; i < count; i++)
        z[i] = (uint32_t)x[i] << 16;
}

VECTORISED static void narrow_bf16(void *out, const void *in, size_t count)
{
    uint16_t *z = out;
    const uint32_t *x = in;
    for (size_t i = 0; i < count; i++) {
        uint32_t rounded = (x[i] + 0x7fff + (x[i] >> 16 & 1)) >> 16;
        z[i] = (uint16_t)((x[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
}

static float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) /* infinite, or not a number */
        return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) /* below the normal ones: so many times 2 to the -24 */
        return float_of(sign | bits_of((float)rest * 0x1p-24f));
    return float_of(sign | ((rest << 13) + (112u << 23)));
}

static uint16_t float_to_half(float x)
{
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000)
        return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x1ff));
    if (rest >= 0x477ff000) /* rounds to more than there is */
        return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) /* 0.5 has its last bit where these have theirs: 2 to the -24 */
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

static void widen_f16_portable(void *out, const void *in, size_t count)
{
    float *z = out;
    const uint16_t *x = in;
    for (size_t i = 0; i < count; i++)
        z[i] = half_to_float(x[i]);
}

static void narrow_f16_portable(void *out, const void *in, size_t count)
{
    uint16_t *z = out;
    const float *x = in;
    for (size_t i = 0; i < count; i++)
        z[i] = float_to_half(x[i]);
}

#ifdef HAS_F16C
__attribute__((target("avx,f16c"))) static void widen_f16c(void *out, const void *in,
                                                            size_t count)
{
    float *z = out;
    const uint16_t *x = in;
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(z + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    widen_f16_portable(z + i, x + i, count - i);
}

__attribute__((target("avx,f16c"))) static void narrow_f16c(void *out, const void *in,
                                                             size_t count)
{
    uint16_t *z = out;
    const float *x = in;
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(z + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    narrow_f16_portable(z + i, x + i, count - i);
}
#endif

/* In the order of `_shm.KINDS`. */
Kind kinds[KINDS] = {
    {4, add_f32, NULL, NULL},
    {8, add_f64, NULL, NULL},
    {2, add_f32, widen_bf16, narrow_bf16},
    {2, add_f32, widen_f16_portable, narrow_f16_portable},
    {1, add_u8, NULL, NULL},
    {2, add_u16, NULL, NULL},
    {4, add_u32, NULL, NULL},
    {8, add_u64, NULL, NULL},
};

/* Take what this processor has, or, for tests, what every one has. */
void choose_kernels(int is_portable)
{
    kinds[FLOAT16].widen = widen_f16_portable;
    kinds[FLOAT16].narrow = narrow_f16_portable;
#ifdef HAS_F16C
    /* Every processor with AVX2 has F16C, which not all compilers can ask for. */
    if (!is_portable && __builtin_cpu_supports("avx2")) {
        kinds[FLOAT16].widen = widen_f16c;
        kinds[FLOAT16].narrow = narrow_f16c;
    }
#else
    (void)is_portable;
#endif
}

static char *temp_of(const Plan *plan, int place)
{
    return plan->temps + (size_t)place * BLOCK * sizeof(double);
}

/* Run the program on `count` elements, no more than a block. What is on the stack at place d is a
 * source or lies in temp d, so that a sum may go to the temp of its left side. */
static void evaluate_block(const Plan *plan, size_t offset, size_t count, char *out)
{
    const char *stack[plan->parts];
    int depth = 0;
    size_t bytes = count * plan->kind->width;
    for (int step = 0; step < plan->steps; step++) {
        int part = plan->program[step];
        int is_last = step + 1 == plan->steps && plan->narrow == NULL;
        if (part >= 0) {
            const char *source = plan->sources[part] + offset * plan->kind->width;
            if (plan->kind->widen != NULL) {
                plan->kind->widen(temp_of(plan, depth), source, count);
                source = temp_of(plan, depth);
            } else if (is_last) {
                memmove(out, source, bytes);
            }
            stack[depth++] = source;
            continue;
        }
        depth--;
        char *sum = is_last ? out : temp_of(plan, depth - 1);
        plan->kind->add(sum, stack[depth - 1], stack[depth], count);
        stack[depth - 1] = sum;
    }
    if (plan->narrow != NULL)
        plan->narrow(out, stack[0], count);
}

/* Add elements offset .. offset + count - 1 of `plan->sources` into `out`. */
void evaluate(const Plan *plan, size_t offset, size_t count, char *out)
{
    if (plan->parts == 2 && plan->narrow == NULL) {
        size_t bytes = offset * plan->kind->width;
        const char *left = plan->sources[plan->program[0]], *right = plan->sources[plan->program[1]];
        plan->kind->add(out, left + bytes, right + bytes, count);
        return;
    }
    for (size_t done = 0; done < count; done += BLOCK) {
        size_t length = count - done < BLOCK ? count - done : BLOCK;
        evaluate_block(plan, offset + done, length, out + done * plan->out_kind->width);
    }
}
