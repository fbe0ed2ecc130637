// The machine's limit for benchmarks/patterns.py: how many ANDs, bit counts and additions of 64 bits
// per second, all in registers. Compiled for the machine itself; prints words per second.
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#if defined(__AVX512VPOPCNTDQ__)
#include <immintrin.h>
typedef __m512i Word;
#define AND(a, b) _mm512_and_si512(a, b)
#define ADD(a, b) _mm512_add_epi64(a, b)
#define COUNT(a) _mm512_popcnt_epi64(a)
#define SAME(x) _mm512_set1_epi64(x)
#define KEPT "+v"
#else
typedef uint64_t Word;
#define AND(a, b) ((a) & (b))
#define ADD(a, b) ((a) + (b))
#define COUNT(a) ((uint64_t)__builtin_popcountll(a))
#define SAME(x) ((uint64_t)(x))
#define KEPT "+r"
#endif

enum { CHAINS = 8, STEPS = 1 << 16, RUNS = 200 };

// A step of one chain; arrays would be kept in memory.
#define STEP(i) s##i = ADD(s##i, COUNT(AND(left, r##i)))
#define CHAIN(i) Word s##i = SAME(0), r##i = SAME(0x9E3779B97F4A7C15u * (i + 1))

static double run(uint64_t* used) {
  CHAIN(0); CHAIN(1); CHAIN(2); CHAIN(3); CHAIN(4); CHAIN(5); CHAIN(6); CHAIN(7);
  Word left = SAME(0x123456789ABCDEFu);
  struct timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int step = 0; step < STEPS; ++step) {
    __asm__ volatile("" : KEPT(left));  // or the compiler would count once
    STEP(0); STEP(1); STEP(2); STEP(3); STEP(4); STEP(5); STEP(6); STEP(7);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  const Word all = ADD(ADD(ADD(s0, s1), ADD(s2, s3)), ADD(ADD(s4, s5), ADD(s6, s7)));
  *used += *(const uint64_t*)&all;
  return (double)(end.tv_sec - start.tv_sec) + (double)(end.tv_nsec - start.tv_nsec) / 1e9;
}

int main(void) {
  uint64_t used = 0;
  double best = 1e30;
  for (int i = 0; i < RUNS; ++i) {
    const double seconds = run(&used);
    if (seconds < best) best = seconds;
  }
  fprintf(stderr, "%llu\n", (unsigned long long)used);
  printf("%.6g\n", (double)STEPS * CHAINS * (sizeof(Word) / 8) / best);
  return 0;
}
