/* The processor's rate of fused multiply-adds of float32: a loop of nothing else, by every thread at the same time.
Compiled for each of two instruction sets (setup.py); rate.py picks one. */

#include <immintrin.h>
#include <omp.h>
#include <stdint.h>

#ifdef __AVX512F__
typedef __m512 vec;
#define SPREAD _mm512_set1_ps
#define MULTIPLY_ADD _mm512_fmadd_ps
#else
typedef __m256 vec;
#define SPREAD _mm256_set1_ps
#define MULTIPLY_ADD _mm256_fmadd_ps
#endif

/* The compiler has to believe that something reads v and changes it, here and now. */
#define USED(v) __asm__ volatile("" : "+x"(v) : : "memory")

/* A processor starts two a cycle and ends each 4 or 5 cycles later, so 10 have to be under way at once. 12 sums, the
factor and the summand fit into the 16 registers of AVX2. */
enum { SUMS = 12, LANES = sizeof(vec) / sizeof(float) };

/* SUMS * times of them, each waiting for the one SUMS before it: s <- s / 2 + 1, which stays below 12. */
static void multiply_add(int64_t times) {
    const vec half = SPREAD(0.5f), one = SPREAD(1.0f);
    vec sums[SUMS];
    for (int i = 0; i < SUMS; i++) sums[i] = SPREAD((float)i);
    _Pragma("GCC unroll 16") for (int i = 0; i < SUMS; i++) USED(sums[i]);
    for (int64_t t = 0; t < times; t++)
        _Pragma("GCC unroll 16") for (int i = 0; i < SUMS; i++) sums[i] = MULTIPLY_ADD(sums[i], half, one);
    _Pragma("GCC unroll 16") for (int i = 0; i < SUMS; i++) USED(sums[i]);
}

/* Operations a second (two a multiply-add) of so many threads together. A part of the work goes before it, untimed:
until then a processor may run slower, and threads of an earlier call wait busily for more. */
double multiply_add_rate(int threads, int64_t times) {
    double rate = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : rate)
    {
        multiply_add(times / 2);
        #pragma omp barrier
        double started = omp_get_wtime();
        multiply_add(times);
        rate = 2.0 * LANES * SUMS * (double)times / (omp_get_wtime() - started);
    }
    return rate;
}
