// The scalar twin of every kernel: oracle in the tests, and what runs where there is nothing faster.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "formats/dequant.h"
#include "kernels/shared.h"

namespace fallow {
namespace {

// W[row] . x for a quantised row: integers within a group, float across groups.
template <class F>
float dot_row(const uint8_t* b, size_t k, const Activation& x) {
  float total = 0;
  for (size_t base = 0; base < k; base += F::block, b += F::bytes) {
    uint8_t q[F::block];
    float s[F::block / F::group], m[F::block / F::group];
    F::unpack(b, q, s, m);
    for (size_t g = 0; g < F::block / F::group; ++g) {
      int32_t sum = 0, sum_x = 0;
      for (size_t i = g * F::group; i < (g + 1) * F::group; ++i) {
        const int value = 256 * x.high[base + i] + x.low[base + i];
        sum += (static_cast<int>(q[i]) - static_cast<int>(F::offset)) * value;
        sum_x += value;
      }
      const float d = x.d[(base + g * F::group) / 32];
      total += s[g] * d * static_cast<float>(sum);
      if (F::has_min) total -= m[g] * d * static_cast<float>(sum_x);
    }
  }
  return total;
}

template <class F>
void gemv_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const Activation& x, float* y) {
  for (size_t i = 0; i < n; ++i)
    y[i] = dot_row<F>(w + row_of(rows, begin, i) * row_bytes, k, x);
}

template <class F>
void axpy_rows(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
               size_t k, const float* coefficient, float* y) {
  float values[F::block];
  for (size_t i = 0; i < n; ++i) {
    const uint8_t* b = w + row_of(rows, begin, i) * row_bytes;
    for (size_t base = 0; base < k; base += F::block, b += F::bytes) {
      decode_blocks<F>(b, 1, values);
      for (size_t j = 0; j < F::block; ++j) y[base + j] += coefficient[i] * values[j];
    }
  }
}

// F32, F16, BF16: one weight at a time.
struct F32 {
  static constexpr size_t bytes = 4;
  static float load(const uint8_t* p) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
};
struct F16 {
  static constexpr size_t bytes = 2;
  static float load(const uint8_t* p) { return load_f16(p); }
};
struct BF16 {
  static constexpr size_t bytes = 2;
  static float load(const uint8_t* p) { return load_bf16(p); }
};

template <class F>
void gemv_rows_float(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                     size_t n, size_t k, const Activation& x, float* y) {
  const auto dot = [](const uint8_t* row, const float* v, size_t width) {
    float sum = 0;
    for (size_t j = 0; j < width; ++j) sum += F::load(row + j * F::bytes) * v[j];
    return sum;
  };
  gemv_floats(w, row_bytes, rows, begin, n, k, x, dot, y);
}

template <class F>
void axpy_rows_float(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                     size_t n, size_t k, const float* coefficient, float* y) {
  const auto add_row = [](float c, const uint8_t* row, size_t width, float* sum) {
    for (size_t j = 0; j < width; ++j) sum[j] += c * F::load(row + j * F::bytes);
  };
  axpy_floats(w, row_bytes, rows, begin, n, k, coefficient, add_row, y);
}

void gemv_two_bits(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin, size_t n,
                   size_t k, const Activation& x, float* y) {
  std::vector<float> row(k);
  for (size_t i = 0; i < n; ++i) {
    decode_two_bits(w + row_of(rows, begin, i) * row_bytes, k, row.data());
    float sum = 0;
    for (size_t j = 0; j < k; ++j) sum += row[j] * x.x[j];
    y[i] = sum;
  }
}

void decode(uint32_t type, const uint8_t* row, size_t k, float* y) {
  if (type == kTwoBits) return decode_two_bits(row, k, y);
  const BlockFormat& format = *find_format(type);
  format.decode(row, k / format.block_size, y);
}

void quantize(const float* x, size_t k, int8_t* high, int8_t* low, float* d, float* sum,
              float* sum16) {
  // 127 * 256 and at most 127 below it: then `high` stays within 127.
  constexpr float kLargest = 32512;
  for (size_t b = 0; b < k / 32; ++b, x += 32, high += 32, low += 32) {
    float largest = 0;
    for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(x[i]));
    d[b] = largest / kLargest;
    const float inverse = largest > 0 ? kLargest / largest : 0.0f;
    for (int h = 0; h < 2; ++h) {
      int total = 0;
      for (int i = 16 * h; i < 16 * h + 16; ++i) {
        const int value = static_cast<int>(std::nearbyint(x[i] * inverse));
        high[i] = static_cast<int8_t>((value + 128) >> 8);
        low[i] = static_cast<int8_t>(value - 256 * high[i]);
        total += value;
      }
      sum16[2 * b + h] = d[b] * static_cast<float>(total);
    }
    sum[b] = sum16[2 * b] + sum16[2 * b + 1];
  }
}

void panel_f32(const float* rows, size_t n, size_t k, float* panel) {
  for (size_t j = 0; j < k; ++j)
    for (size_t r = 0; r < kPanel; ++r) panel[j * kPanel + r] = r < n ? rows[r * k + j] : 0.0f;
}

void gemm_f32(const float* a, size_t n, size_t k, const float* x, size_t x_stride, size_t tokens,
              bool add, float* y, size_t stride) {
  for (size_t t = 0; t < tokens; ++t)
    for (size_t r = 0; r < n; ++r) {
      float sum = add ? y[t * stride + r] : 0.0f;
      for (size_t j = 0; j < k; ++j) sum += a[j * kPanel + r] * x[t * x_stride + j];
      y[t * stride + r] = sum;
    }
}

void to_f16(const float* x, size_t n, uint16_t* y) {
  for (size_t i = 0; i < n; ++i) y[i] = float_to_half(x[i]);
}

float sum_squares(const float* x, size_t n) {
  float sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

float softmax_numerators(float* x, size_t n, float& largest) {
  float sum = 0;
  largest = -__builtin_inff();
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, x[i]);
  for (size_t i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - largest);
  return sum;
}

// Magnitudes order like their bits, so the answer is found by bisection over those: 31 passes that
// the compiler turns into vector code, against 5.8 times as long for std::nth_element.
float topk_threshold(const float* magnitudes, size_t n, size_t k) {
  if (k >= n) return 0.0f;
  uint32_t low = 0, high = 0x7FFFFFFF;  // the smallest bits with at most k magnitudes above them
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    size_t above = 0;
    for (size_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, magnitudes + i, sizeof bits);
      above += (bits & 0x7FFFFFFF) > middle;
    }
    if (above <= k) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return std::bit_cast<float>(low);
}

size_t list_nonzero(const float* values, size_t begin, size_t end, int32_t* list) {
  size_t n = 0;
  for (size_t i = begin; i < end; ++i) {
    list[n] = static_cast<int32_t>(i);
    n += values[i] != 0;
  }
  return n;
}

void silu(float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) x[i] /= 1 + std::exp(-x[i]);
}

void gelu_tanh(float* x, size_t n) {
  constexpr float kSqrt2OverPi = 0.7978845608f;
  for (size_t i = 0; i < n; ++i)
    x[i] *= 0.5f * (1 + std::tanh(kSqrt2OverPi * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
}

template <class F>
void add(Kernels& table) {
  table.gemv_rows[F::type] = gemv_rows<F>;
  table.axpy_rows[F::type] = axpy_rows<F>;
}

template <class F>
void add_float(Kernels& table, uint32_t type) {
  table.gemv_rows[type] = gemv_rows_float<F>;
  table.axpy_rows[type] = axpy_rows_float<F>;
}

void and_tile(const uint64_t* const* rows, const uint64_t* const* others, size_t words,
              uint32_t* counts) {
  for (size_t r = 0; r < kBitTile; ++r)
    for (size_t c = 0; c < kBitTile; ++c) {
      uint32_t count = 0;
      for (size_t i = 0; i < words; ++i)
        count += static_cast<uint32_t>(std::popcount(rows[r][i] & others[c][i]));
      counts[r * kBitTile + c] = count;
    }
}

Kernels make() {
  Kernels table{};
  table.name = "portable";
  for_each_format([&]<class F>() { add<F>(table); });
  add_float<F32>(table, kF32);
  add_float<F16>(table, kF16);
  add_float<BF16>(table, kBF16);
  table.gemv_rows[kTwoBits] = gemv_two_bits;
  table.decode = decode;
  table.quantize = quantize;
  table.panel_f32 = panel_f32;
  table.gemm_f32 = gemm_f32;
  table.to_f16 = to_f16;
  table.sum_squares = sum_squares;
  table.softmax_numerators = softmax_numerators;
  table.topk_threshold = topk_threshold;
  table.list_nonzero = list_nonzero;
  table.and_tile = and_tile;
  table.silu = silu;
  table.gelu_tanh = gelu_tanh;
  return table;
}

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels table = make();
  return table;
}

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found{avx512_bf16_kernels(), avx512_kernels(), avx2_kernels(),
                                      neon_dotprod_kernels(), neon_kernels(), &portable_kernels()};
    std::erase(found, nullptr);
    return found;
  }();
  return tables;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* table : usable_kernels())
    if (std::strcmp(table->name, name) == 0) return table;
  return nullptr;
}

}  // namespace fallow
