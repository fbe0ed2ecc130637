// Whether the upper digits of a vector say enough of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/kernels.h"

namespace fallow {

// The largest error that one digit may make of a vector, of its norm. Of the inputs of Qwen2.5-Coder-1.5B
// 98 % keep to it, and the model is 0.0004 nats from its two-digit self, with one digit always 0.0044:
// inputs with a few large values, such as the first token's, are the ones that need two. SmolLM2, 68 % of
// inputs: 0.0012 and 0.0042; Gemma-3-270M, 53 %: 0.0008 and 0.0022.
constexpr float kDigitError = 0.0095f;

// Kernels::quantize of x (k,); true where one digit is enough, and the lower ones are 0. Rounding to steps s
// leaves an error of s / sqrt(12) in each value. Where x has NaN or infinity, which have no digits, every
// product with it is NaN.
inline bool quantize_in_digits(const Kernels& kernels, const float* x, size_t k, int8_t* high, int8_t* low,
                               float* d, float* sum, float* sum16) {
  const float total_squares = kernels.sum_squares(x, k);
  if (!std::isfinite(total_squares) && !std::all_of(x, x + k, [](float v) { return std::isfinite(v); })) {
    std::memset(high, 0, k);
    std::memset(low, 0, k);
    for (float* scales : {d, sum}) std::fill_n(scales, k / 32, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(sum16, k / 16, std::numeric_limits<float>::quiet_NaN());
    return false;
  }
  kernels.quantize(x, k, high, low, d, sum, sum16);
  float squares = 0;
  for (size_t b = 0; b < k / 32; ++b) squares += d[b] * d[b];
  const float error = squares * (256.0f * 256.0f * 32 / 12);
  if (!(error <= kDigitError * kDigitError * total_squares)) return false;
  std::memset(low, 0, k);
  for (size_t h = 0; h < k / 16; ++h) {
    int total = 0;
    for (size_t i = 16 * h; i < 16 * h + 16; ++i) total += high[i];
    sum16[h] = d[h / 2] * static_cast<float>(256 * total);
  }
  for (size_t b = 0; b < k / 32; ++b) sum[b] = sum16[2 * b] + sum16[2 * b + 1];
  return true;
}

}  // namespace fallow
