// The machine's limit for benchmarks/patterns.py: how many ANDs, bit counts and additions of 64 bits
// per second, all in registers. Compiled for the machine itself; prints words per second.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { CHAINS = 12, LANES = 8, STEPS = 1 << 16, RUNS = 200 };

typedef uint64_t Lanes __attribute__((vector_size(8 * LANES)));

static inline Lanes bit_counts(Lanes v) {
#if defined(__AVX512VPOPCNTDQ__)
  __asm__("vpopcntq %0, %0" : "+v"(v));
#else
  for (int i = 0; i < LANES; ++i) v[i] = (uint64_t)__builtin_popcountll(v[i]);
#endif
  return v;
}

int main(void) {
  Lanes sums[CHAINS] = {0}, left, right[CHAINS];
  for (int i = 0; i < LANES; ++i) left[i] = (uint64_t)rand() << 32 | (uint64_t)rand();
  for (int c = 0; c < CHAINS; ++c)
    for (int i = 0; i < LANES; ++i) right[c][i] = (uint64_t)rand() << 32 | (uint64_t)rand();
  double best = 1e30;
  for (int run = 0; run < RUNS; ++run) {
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int step = 0; step < STEPS; ++step) {
      __asm__ volatile("" : "+v"(left));
      for (int c = 0; c < CHAINS; ++c) sums[c] += bit_counts(left & right[c]);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds = (double)(end.tv_sec - start.tv_sec) + (end.tv_nsec - start.tv_nsec) / 1e9;
    if (seconds < best) best = seconds;
  }
  uint64_t total = 0;
  for (int c = 0; c < CHAINS; ++c)
    for (int i = 0; i < LANES; ++i) total += sums[c][i];
  fprintf(stderr, "%llu\n", (unsigned long long)total);
  printf("%.6g\n", (double)STEPS * CHAINS * LANES / best);
  return 0;
}
