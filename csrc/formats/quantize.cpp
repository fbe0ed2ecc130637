#include "formats/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/formats.h"
#include "parallel.h"

namespace fallow {
namespace {

void store_half(uint8_t* p, float value) {
  const uint16_t half = float_to_half(value);
  std::memcpy(p, &half, 2);
}

int nearest(float value, int low, int high) {
  return std::clamp(static_cast<int>(std::nearbyint(value)), low, high);
}

struct Fit {
  float scale, minimum;
};

// scale and minimum >= 0 with the least squared error of scale * q - minimum, q in [0, levels].
// Steps around (max - min) / levels are tried; for each the best line through the q is taken.
Fit fit_line(const float* x, int n, int levels) {
  const float low = std::min(0.0f, *std::min_element(x, x + n));
  const float high = *std::max_element(x, x + n);
  if (high <= low) return {0.0f, -low};
  Fit best{(high - low) / static_cast<float>(levels), -low};
  double best_error = -1;
  for (int trial = -10; trial <= 10; ++trial) {
    const float step = (high - low) / (static_cast<float>(levels) + 0.1f * static_cast<float>(trial));
    double sq = 0, sqq = 0, sx = 0, sqx = 0;
    for (int i = 0; i < n; ++i) {
      const double q = nearest((x[i] - low) / step, 0, levels);
      sq += q;
      sqq += q * q;
      sx += x[i];
      sqx += q * x[i];
    }
    const double det = n * sqq - sq * sq;
    if (det <= 0) continue;
    double scale = (n * sqx - sq * sx) / det, minimum = (sq * sqx - sqq * sx) / det;
    if (minimum < 0) {  // the format has no positive start
      minimum = 0;
      scale = sqx / sqq;
    }
    if (scale <= 0) continue;
    double error = 0;
    for (int i = 0; i < n; ++i) {
      const int q = nearest(static_cast<float>((x[i] + minimum) / scale), 0, levels);
      const double e = scale * q - minimum - x[i];
      error += e * e;
    }
    if (best_error < 0 || error < best_error) {
      best_error = error;
      best = {static_cast<float>(scale), static_cast<float>(minimum)};
    }
  }
  return best;
}

// Q4_K and Q5_K: eight groups of 32, six-bit scales and minima.
template <class F>
void quantize_lines(const float* x, uint8_t* out) {
  constexpr int levels = F::type == kQ4_K ? 15 : 31;
  Fit fits[8];
  float scale = 0, minimum = 0;
  for (int g = 0; g < 8; ++g) {
    fits[g] = fit_line(x + 32 * g, 32, levels);
    scale = std::max(scale, fits[g].scale);
    minimum = std::max(minimum, fits[g].minimum);
  }
  std::memset(out, 0, F::bytes);
  store_half(out, scale / 63);
  store_half(out + 2, minimum / 63);
  const float d = load_f16(out), dmin = load_f16(out + 2);
  uint8_t *packed = out + 4, *nibbles = out + (F::type == kQ4_K ? 16 : 48), *fifth = out + 16;
  for (int g = 0; g < 8; ++g) {
    const int s = d > 0 ? nearest(fits[g].scale / d, 0, 63) : 0;
    const int m = dmin > 0 ? nearest(fits[g].minimum / dmin, 0, 63) : 0;
    if (g < 4) {
      packed[g] = static_cast<uint8_t>(packed[g] | s);
      packed[g + 4] = static_cast<uint8_t>(packed[g + 4] | m);
    } else {
      packed[g + 4] = static_cast<uint8_t>((s & 15) | (m & 15) << 4);
      packed[g - 4] = static_cast<uint8_t>(packed[g - 4] | (s >> 4) << 6);
      packed[g] = static_cast<uint8_t>(packed[g] | (m >> 4) << 6);
    }
    const float step = d * static_cast<float>(s), start = dmin * static_cast<float>(m);
    for (int i = 0; i < 32; ++i) {
      const int q = step > 0 ? nearest((x[32 * g + i] + start) / step, 0, levels) : 0;
      uint8_t& byte = nibbles[g / 2 * 32 + i];
      byte = static_cast<uint8_t>(byte | (q & 15) << (g % 2 * 4));
      if (F::type == kQ5_K) fifth[i] = static_cast<uint8_t>(fifth[i] | (q >> 4) << g);
    }
  }
}

// The signed scale with the least squared error of scale * q, q in [-32, 31].
float fit_scale(const float* x, int n) {
  float extreme = 0;
  for (int i = 0; i < n; ++i)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  if (extreme == 0) return 0;
  float best = extreme / -32;
  double best_gain = 0;
  for (int trial = -9; trial <= 9; ++trial) {
    const float inverse = -(32 + 0.1f * static_cast<float>(trial)) / extreme;
    double sqx = 0, sqq = 0;
    for (int i = 0; i < n; ++i) {
      const double q = nearest(x[i] * inverse, -32, 31);
      sqx += q * x[i];
      sqq += q * q;
    }
    if (sqq > 0 && sqx * sqx > best_gain * sqq) {
      best_gain = sqx * sqx / sqq;
      best = static_cast<float>(sqx / sqq);
    }
  }
  return best;
}

// Q6_K: sixteen groups of 16, signed eight-bit scales.
void quantize_q6_k(const float* x, uint8_t* out) {
  float scales[16], extreme = 0;
  for (int g = 0; g < 16; ++g) {
    scales[g] = fit_scale(x + 16 * g, 16);
    if (std::fabs(scales[g]) > std::fabs(extreme)) extreme = scales[g];
  }
  std::memset(out, 0, Q6_K::bytes);
  store_half(out + 208, extreme / -128);
  const float d = load_f16(out + 208);
  for (int g = 0; g < 16; ++g) {
    const int s = d != 0 ? nearest(scales[g] / d, -128, 127) : 0;
    out[192 + g] = static_cast<uint8_t>(s);
    const float step = d * static_cast<float>(s);
    for (int i = 16 * g; i < 16 * g + 16; ++i) {
      const int q = (step != 0 ? nearest(x[i] / step, -32, 31) : 0) + 32;
      const int half = i / 128, part = i % 128 / 32, l = i % 32;
      uint8_t& low = out[64 * half + 32 * (part % 2) + l];
      uint8_t& high = out[128 + 32 * half + l];
      low = static_cast<uint8_t>(low | (q & 15) << (part / 2 * 4));
      high = static_cast<uint8_t>(high | (q >> 4) << (2 * part));
    }
  }
}

}  // namespace

bool quantize_k(uint32_t type, const float* x, uint64_t n, uint8_t* out, int n_threads) {
  if (type != kQ4_K && type != kQ5_K && type != kQ6_K) return false;
  const auto each = [&](uint32_t bytes, auto encode) {
    parallel_ranges(n / 256, n_threads, [&](size_t begin, size_t end, int) {
      for (size_t b = begin; b < end; ++b) encode(x + 256 * b, out + bytes * b);
    });
  };
  if (type == kQ4_K) each(Q4_K::bytes, quantize_lines<Q4_K>);
  if (type == kQ5_K) each(Q5_K::bytes, quantize_lines<Q5_K>);
  if (type == kQ6_K) each(Q6_K::bytes, quantize_q6_k);
  return true;
}

}  // namespace fallow
