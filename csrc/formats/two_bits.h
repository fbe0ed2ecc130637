// Rows in two bits per weight with one scale: the coarse copies of a language-model head and of gates. Not
// a type of ggml's, whose blocks have scales of their own: on hidden states one scale per row is as good
// (docs/packed.md), and without blocks a byte product of 64 weights needs nothing more.
//
// Row of k weights: k / 4 bytes, of which byte p holds the codes of columns p, p + k / 4, p + k / 2
// and p + 3 k / 4 from its lowest bits up; then the scale, float32. w = scale * (code - 1.5).
#pragma once

#include <algorithm>
#include <cmath>

#include "formats/formats.h"

namespace fallow {

constexpr float kTwoBitsMiddle = 1.5f;
// Columns for which 32 bits hold the sum of 3 * 32640 each.
constexpr size_t kTwoBitsWidest = 20480;

static inline size_t two_bits_bytes(size_t k) { return k / 4 + sizeof(float); }

static inline float two_bits_scale(const uint8_t* row, size_t k) {
  float scale;
  std::memcpy(&scale, row + k / 4, sizeof scale);
  return scale;
}

static inline void decode_two_bits(const uint8_t* row, size_t k, float* y) {
  const float scale = two_bits_scale(row, k);
  const size_t quarter = k / 4;
  for (size_t part = 0; part < 4; ++part)
    for (size_t p = 0; p < quarter; ++p)
      y[part * quarter + p] =
          scale * (static_cast<float>(row[p] >> (2 * part) & 3) - kTwoBitsMiddle);
}

// Every kernel file has this in its own instructions.
namespace {

// A vector x (k,) as d * (256 * high + low), one d for all. Both planes have kSlack zeros behind them,
// so that a quarter's last register may reach past its end.
class OneScale {
 public:
  static constexpr size_t kSlack = 64;

  OneScale(const float* x, size_t k)
      : high_(new int8_t[2 * (k + kSlack)]()), low_(high_ + k + kSlack) {
    constexpr float kLargest = 32512;  // 127 * 256: then `high` stays within 127
    float largest = 0;
    for (size_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x[i]));
    d_ = largest / kLargest;
    const float inverse = largest > 0 ? kLargest / largest : 0.0f;
    int64_t total = 0;
    for (size_t i = 0; i < k; ++i) {
      const int value = static_cast<int>(std::nearbyint(x[i] * inverse));
      const int upper = (value + 128) >> 8;
      high_[i] = static_cast<int8_t>(upper);
      low_[i] = static_cast<int8_t>(value - 256 * upper);
      total += value;
    }
    middle_ = kTwoBitsMiddle * static_cast<float>(total);
  }

  ~OneScale() { delete[] high_; }
  OneScale(const OneScale&) = delete;
  OneScale& operator=(const OneScale&) = delete;

  const int8_t* high() const { return high_; }
  const int8_t* low() const { return low_; }
  // W[row] . x from the sum of code * (256 * high + low).
  float dot(float scale, int32_t sum) const {
    return scale * d_ * (static_cast<float>(sum) - middle_);
  }

 private:
  int8_t *high_, *low_;
  float d_, middle_;
};

}  // namespace

}  // namespace fallow
