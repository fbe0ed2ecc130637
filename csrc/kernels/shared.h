// What the kernel files share. Each compiles it in its own instructions; all of it is in an anonymous
// namespace, for were it shared between files, the linker might take one that the processor lacks
// instructions for.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/kernels.h"

// The inner loops keep their sums in registers, which ends where a call is not inlined: gemv_rows of
// AVX-512 was 2.4 times slower when the compiler had its own way.
#define FALLOW_INLINE inline __attribute__((always_inline))

namespace fallow {
namespace {

FALLOW_INLINE size_t row_of(const int32_t* rows, size_t begin, size_t i) {
  return rows ? static_cast<size_t>(rows[i]) : begin + i;
}

// Asks for the n bytes at p, a part of a later row, and moves on to the next part. Whole rows at once
// would be more than the processor keeps in flight; rows of 5 KB then ran at 56 % of memory speed.
FALLOW_INLINE void prefetch(const uint8_t*& p, size_t n) {
  if (!p) return;
  for (size_t i = 0; i < n; i += 64) __builtin_prefetch(p + i, 0, 1);
  p += n;
}

// Of the weights of a format.
template <class F>
constexpr int kBits = std::bit_width(2 * F::centre - 1);

// Calls some.operator()<count>(first) for groups of tokens, `most` or what is left.
template <size_t most = kTokens, class Some>
FALLOW_INLINE void in_groups(size_t tokens, const Some& some) {
  size_t t = 0;
  for (; t + most <= tokens; t += most) some.template operator()<most>(t);
  [&]<size_t... fewer>(std::index_sequence<fewer...>) {
    ((tokens - t == fewer + 1 ? some.template operator()<fewer + 1>(t) : void()), ...);
  }(std::make_index_sequence<most - 1>());
}

// Columns of a sum of rows that are summed at a time: their sums and minima stay in the first cache.
constexpr size_t kSlab = 4096;

// Rows of floats: `dot(row, x, k)` and `add(c, row, k, y)` are a file's own.
template <class Dot>
FALLOW_INLINE void gemv_floats(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                               size_t n, size_t k, const Activation& x, const Dot& dot, float* y) {
  for (size_t i = 0; i < n; ++i) y[i] = dot(w + row_of(rows, begin, i) * row_bytes, x.x, k);
}
template <class Add>
FALLOW_INLINE void axpy_floats(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                               size_t n, size_t k, const float* coefficient, const Add& add,
                               float* y) {
  for (size_t i = 0; i < n; ++i) add(coefficient[i], w + row_of(rows, begin, i) * row_bytes, k, y);
}

// Functions of registers. V is a file's own: F, splat(x), min, max, fma(a, b, c) = a b + c and
// fnma(a, b, c) = c - a b rounded once, round (to even), scale(p, n) = p 2^n, n whole.

// e^x to 2 ulp: x = n ln 2 + r, a polynomial of degree 6 for e^r (|r| <= ln 2 / 2), times 2^n.
template <class V>
FALLOW_INLINE typename V::F exp_of(typename V::F x) {
  x = V::min(V::max(x, V::splat(-103.0f)), V::splat(88.7f));
  const typename V::F n = V::round(x * V::splat(1.44269504f));
  typename V::F r = V::fnma(n, V::splat(0.693359375f), x);
  r = V::fnma(n, V::splat(-2.12194440e-4f), r);
  typename V::F p = V::splat(1.0f / 720);
  constexpr float kTerms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float c : kTerms) p = V::fma(p, r, V::splat(c));
  return V::scale(p, n);
}

// x / (1 + e^-z)
template <class V>
FALLOW_INLINE typename V::F sigmoid_times(typename V::F x, typename V::F z) {
  return x / (V::splat(1) + exp_of<V>(V::splat(0) - z));
}

template <class V>
FALLOW_INLINE typename V::F silu_of(typename V::F x) {
  return sigmoid_times<V>(x, x);
}

// 0.5 x (1 + tanh z) = x / (1 + e^(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
FALLOW_INLINE typename V::F gelu_tanh_of(typename V::F x) {
  const typename V::F z = V::fma(x * x * x, V::splat(0.044715f), x);
  return sigmoid_times<V>(x, z * V::splat(2 * 0.7978845608f));
}

// Applies a function of V::n values to n, the last ones padded with zeros.
template <class V, class Function>
FALLOW_INLINE void in_place(float* x, size_t n, const Function& function) {
  size_t i = 0;
  for (; i + V::n <= n; i += V::n) V::store(x + i, function(V::load(x + i)));
  if (i == n) return;
  float rest[V::n] = {};
  for (size_t j = i; j < n; ++j) rest[j - i] = x[j];
  V::store(rest, function(V::load(rest)));
  for (size_t j = i; j < n; ++j) x[j] = rest[j - i];
}

template <class V>
FALLOW_INLINE float softmax_numerators_of(float* x, size_t n, float& largest) {
  const size_t whole = n / V::n * V::n;
  largest = -__builtin_inff();
  typename V::F top = V::splat(largest), total = V::splat(0);
  float lanes[V::n], sum = 0;
  for (size_t i = 0; i < whole; i += V::n) top = V::max(top, V::load(x + i));
  V::store(lanes, top);
  for (const float v : lanes) largest = v > largest ? v : largest;
  for (size_t i = whole; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  in_place<V>(x, n, [&](typename V::F v) { return exp_of<V>(v - V::splat(largest)); });
  for (size_t i = 0; i < whole; i += V::n) total = total + V::load(x + i);
  V::store(lanes, total);
  for (const float v : lanes) sum += v;
  for (size_t i = whole; i < n; ++i) sum += x[i];
  return sum;
}

// See the portable twin. As the bounds of the threshold come nearer to each other, values outside them
// are left behind. Of the bits of n magnitudes count_above(from, n, limit) are above a limit, and
// keep_between(from, n, low, high, to) packs those of these bounds, returns how many, and may write up to 16
// past them.
template <class CountAbove, class KeepBetween>
FALLOW_INLINE float topk_threshold_of(const float* magnitudes, size_t n, size_t k, const CountAbove& count_above,
                                      const KeepBetween& keep_between) {
  if (k >= n) return 0.0f;
  constexpr size_t kSome = 4096;
  alignas(64) uint32_t some[kSome + 16];
  const auto* from = reinterpret_cast<const uint32_t*>(magnitudes);
  // Of n: those above `high`, and those not below `low`; how many of the former `from` lacks.
  size_t above_high = 0, from_low = n, left_out = 0;
  uint32_t low = 0, high = 0x7FFFFFFF;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const size_t above = left_out + count_above(from, n, middle);
    if (above <= k) {
      high = middle;
      above_high = above;
    } else {
      low = middle + 1;
      from_low = above;
    }
    const size_t between = from_low - above_high;
    if (between > kSome || between > n / 2) continue;
    n = keep_between(from, n, low, high, some);
    from = some;
    left_out = above_high;
  }
  return std::bit_cast<float>(low);
}

}  // namespace
}  // namespace fallow
