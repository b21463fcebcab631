/* Vectors as wide as the processor's registers, in the extensions that GCC and Clang share, for fused.c and images.c.

Both keep sums in registers, tiles of HEIGHT x WIDTH vectors, which each of them chooses. */

#ifndef VECTORS_H
#define VECTORS_H

#include <stdint.h>
#include <string.h>
#ifdef __SANITIZE_ADDRESS__ /* scripts/sanitize_kernel.py */
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) (void)0
#endif

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX2__
#define LANES 8
#else /* NEON, and what any processor has */
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__}) /* the other takes GCC 12 */
#endif
#define CEIL(a, b) (((a) + (b) - 1) / (b))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Cuts columns into panels of at most WIDTH vectors, as equal as can be; each has a first column and a width. */
#define EACH_PANEL(columns, first, width)                                                                      \
    for (int64_t all = CEIL(columns, LANES), parts = CEIL(all, WIDTH), part = 0, first = 0, width;             \
         part < parts && (width = (part + 1) * all / parts - part * all / parts); first += width * LANES, part++)
/* CALL(width), with a width known to the compiler. */
#define BY_WIDTH(width, CALL)                             \
    do {                                                  \
        if ((width) == 1) CALL(1);                        \
        else if ((width) == 2) CALL(2);                   \
        else if ((width) == 3) CALL((WIDTH < 3 ? WIDTH : 3)); \
        else CALL(WIDTH);                                 \
    } while (0)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const unaligned *)p; }

INLINE void store(float *p, vec v) { *(unaligned *)p = v; }

INLINE vec spread(float x) { return (vec){0} + x; }

INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* The first n lanes, and zeros: nothing behind them is read. */
INLINE vec load_first(const float *p, int64_t n) {
    if (n >= LANES) return load(p);
    float lanes[LANES] = {0};
    memcpy(lanes, p, n * sizeof(float));
    return load(lanes);
}

/* The same for writing, by copies of 8, 4, 2 and 1: sizes that the compiler knows. */
INLINE void store_first(float *p, vec v, int64_t n) {
    if (n >= LANES) {
        store(p, v);
        return;
    }
    float lanes[LANES];
    store(lanes, v);
    int64_t i = 0;
    UNROLL for (int h = LANES / 2; h; h /= 2) {
        if (!(n & h)) continue;
        memcpy(p + i, lanes + i, h * sizeof(float));
        i += h;
    }
}

/* v, and zeros behind its first n lanes. */
INLINE vec only_first(vec v, int64_t n) {
    ivec lane;
    UNROLL for (int i = 0; i < LANES; i++) lane[i] = i;
    return n < LANES ? (vec)((ivec)v & (lane < (int32_t)n)) : v;
}

/* Blocks of h x h change places: of lane j, where it comes from. */
#if LANES == 16
#define EACH_LANE(OF, h)                                                                                              \
    OF(0, h), OF(1, h), OF(2, h), OF(3, h), OF(4, h), OF(5, h), OF(6, h), OF(7, h), OF(8, h), OF(9, h), OF(10, h),     \
        OF(11, h), OF(12, h), OF(13, h), OF(14, h), OF(15, h)
#elif LANES == 8
#define EACH_LANE(OF, h) OF(0, h), OF(1, h), OF(2, h), OF(3, h), OF(4, h), OF(5, h), OF(6, h), OF(7, h)
#else
#define EACH_LANE(OF, h) OF(0, h), OF(1, h), OF(2, h), OF(3, h)
#endif
#define UPPER(j, h) ((j) & (h) ? LANES + (j) - (h) : (j))
#define LOWER(j, h) ((j) & (h) ? LANES + (j) : (j) + (h))
#define EXCHANGE(v, h)                                              \
    UNROLL for (int i = 0; i < LANES; i++) {                        \
        if (i & h) continue;                                        \
        vec above = v[i], below = v[i + h];                         \
        v[i] = SHUFFLE(above, below, EACH_LANE(UPPER, h));          \
        v[i + h] = SHUFFLE(above, below, EACH_LANE(LOWER, h));      \
    }

/* v[i][j] becomes v[j][i]. */
INLINE void transpose(vec v[LANES]) {
#if LANES > 8
    EXCHANGE(v, 8)
#endif
#if LANES > 4
    EXCHANGE(v, 4)
#endif
    EXCHANGE(v, 2)
    EXCHANGE(v, 1)
}

/* The sum of the lanes, in each of them. */
#define ROTATED(j, h) (((j) + (h)) % LANES)
INLINE vec total(vec v) {
#if LANES > 8
    v += SHUFFLE(v, v, EACH_LANE(ROTATED, 8));
#endif
#if LANES > 4
    v += SHUFFLE(v, v, EACH_LANE(ROTATED, 4));
#endif
    v += SHUFFLE(v, v, EACH_LANE(ROTATED, 2));
    return v + SHUFFLE(v, v, EACH_LANE(ROTATED, 1));
}

/* e^x, within two ulp; 0 below -87 and 6e37 above 87. It is 2^n e^r with |r| <= ln(2) / 2, and e^r a polynomial. */
INLINE vec exponential(vec x) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded, into its last bits */
    uvec least = (uvec)(x < -87.0f), most = (uvec)(x > 87.0f);
    vec t = x * 1.44269504f + to_integer;
    uvec n = (uvec)t << 23;
    t -= to_integer;
    vec r = x - t * 0.693359375f + t * 2.12194440e-4f; /* ln(2), in two parts */
    vec p = 1.38145e-3f * r + 8.36875e-3f;
    p = p * r + 4.166839e-2f;
    p = p * r + 1.666652e-1f;
    p = p * r + 4.9999993e-1f;
    p = p * r * r + r + 1.0f;
    return (vec)((((uvec)p + n) & ~(least | most)) | (most & (uvec)spread(6e37f)));
}

#endif
