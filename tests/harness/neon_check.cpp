// Every function of the NEON table against its portable twin; tests/test_neon.py runs this.
// One line per failure; exit status 1 if there is any, 2 without a NEON table. With --break one
// result of every comparison is wrong, so that all must fail.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/kernels.h"

using namespace fallow;

namespace {

using Floats = std::vector<float>;

bool broken = false;
int compared = 0, failed = 0;
std::mt19937 rng(0);

void close(const std::string& what, Floats found, const Floats& expected, double error) {
  if (found.empty()) return;
  ++compared;
  if (broken) found.back() += 1;
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i] == expected[i]) continue;
    if (std::fabs(static_cast<double>(found[i]) - expected[i]) <= error) continue;
    std::printf("%s: [%zu] is %g, not %g\n", what.c_str(), i, found[i], expected[i]);
    ++failed;
    return;
  }
}

template <class T>
void equal(const std::string& what, const std::vector<T>& found, const std::vector<T>& expected) {
  close(what, Floats(found.begin(), found.end()), Floats(expected.begin(), expected.end()), 0);
}

Floats normal(size_t n, float sigma = 1) {
  std::normal_distribution<float> distribution(0, sigma);
  Floats x(n);
  for (float& value : x) value = distribution(rng);
  return x;
}

float largest(const Floats& x) {
  float result = 0;
  for (float value : x) result = std::max(result, std::fabs(value));
  return result;
}

// A weight format; `scale` is what its half floats, at the offsets `halves`, are about.
struct Format {
  const char* name;
  uint32_t type;
  size_t block, bytes;
  std::vector<size_t> halves;
  float scale;
};
const Format kFormats[] = {
    {"F32", kF32, 1, 4, {}, 1},
    {"F16", kF16, 1, 2, {}, 1},
    {"BF16", kBF16, 1, 2, {}, 1},
    {"Q4_0", kQ4_0, 32, Q4_0::bytes, {0}, 0.1f},
    {"Q4_1", kQ4_1, 32, Q4_1::bytes, {0, 2}, 0.1f},
    {"Q5_0", kQ5_0, 32, Q5_0::bytes, {0}, 0.1f},
    {"Q5_1", kQ5_1, 32, Q5_1::bytes, {0, 2}, 0.1f},
    {"Q8_0", kQ8_0, 32, Q8_0::bytes, {0}, 0.01f},
    {"Q2_K", kQ2_K, 256, Q2_K::bytes, {80, 82}, 0.05f},
    {"Q3_K", kQ3_K, 256, Q3_K::bytes, {108}, 0.01f},
    {"Q4_K", kQ4_K, 256, Q4_K::bytes, {0, 2}, 0.002f},
    {"Q5_K", kQ5_K, 256, Q5_K::bytes, {0, 2}, 0.002f},
    {"Q6_K", kQ6_K, 256, Q6_K::bytes, {208}, 0.0005f},
};

struct Matrix {
  size_t rows, k, row_bytes;
  std::vector<uint8_t> data;
  Floats values;  // (rows, k)
};

Matrix random_matrix(const Format& format, size_t rows, size_t k) {
  Matrix m{rows, k, k / format.block * format.bytes, {}, Floats(rows * k)};
  m.data.resize(rows * m.row_bytes);
  for (uint8_t& byte : m.data) byte = static_cast<uint8_t>(rng());
  for (size_t at = 0; at < m.data.size(); at += format.bytes) {
    const float value = normal(1, format.scale)[0];
    if (format.type == kF32) std::memcpy(&m.data[at], &value, 4);
    const uint16_t half = format.type == kBF16
                              ? static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16)
                              : float_to_half(value);
    if (format.bytes == 2) std::memcpy(&m.data[at], &half, 2);
    for (size_t offset : format.halves) {
      const uint16_t scale = float_to_half(normal(1, format.scale)[0]);
      std::memcpy(&m.data[at + offset], &scale, 2);
    }
  }
  for (size_t r = 0; r < rows; ++r)
    portable_kernels().decode(format.type, &m.data[r * m.row_bytes], k, &m.values[r * k]);
  return m;
}

// Ascending rows, `sparsity` of them left out.
std::vector<int32_t> choose(size_t rows, double sparsity) {
  std::vector<int32_t> order(rows);
  for (size_t i = 0; i < rows; ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), rng);
  order.resize(static_cast<size_t>(std::lround(static_cast<double>(rows) * (1 - sparsity))));
  std::sort(order.begin(), order.end());
  return order;
}

struct Quantized {
  std::vector<int8_t> high, low;
  Floats d, sum, sum16;

  Quantized(const Kernels& kernels, const Floats& x)
      : high(x.size()), low(x.size()), d(x.size() / 32), sum(x.size() / 32), sum16(x.size() / 16) {
    if (x.size() % 32 == 0)
      kernels.quantize(x.data(), x.size(), high.data(), low.data(), d.data(), sum.data(),
                       sum16.data());
  }
  Activation with(const Floats& x) const {
    return {x.data(), high.data(), low.data(), d.data(), sum.data(), sum16.data()};
  }
};

void check_gemv_rows(const Kernels& neon, const Format& format, const Matrix& m,
                     const std::string& where) {
  const Kernels& portable = portable_kernels();
  const Floats x = normal(m.k);
  const Quantized quantized(portable, x);
  const auto run = [&](const Kernels& kernels, const int32_t* rows, size_t n) {
    Floats y(n);
    kernels.gemv_rows[format.type](m.data.data(), m.row_bytes, rows, 0, n, m.k, quantized.with(x),
                                   y.data());
    return y;
  };
  double scale = 0;
  for (size_t r = 0; r < m.rows; ++r) {
    double sum = 0;
    for (size_t j = 0; j < m.k; ++j) sum += std::fabs(m.values[r * m.k + j]);
    scale = std::max(scale, sum * largest(x));
  }
  const Floats y = run(neon, nullptr, m.rows);
  close("gemv_rows " + where, y, run(portable, nullptr, m.rows), 3e-5 * scale);
  for (double sparsity : {0.0, 0.5, 1.0}) {
    const std::vector<int32_t> rows = choose(m.rows, sparsity);
    Floats expected;
    for (int32_t row : rows) expected.push_back(y[static_cast<size_t>(row)]);
    equal("gemv_rows of a list " + where, run(neon, rows.data(), rows.size()), expected);
  }
}

void check_axpy_rows(const Kernels& neon, const Format& format, const Matrix& m,
                     const std::string& where) {
  const Floats all = normal(m.rows);
  const auto run = [&](const Kernels& kernels, const int32_t* rows, size_t n) {
    Floats y(m.k, 1.0f), coefficient(n);
    for (size_t i = 0; i < n; ++i) coefficient[i] = all[rows ? static_cast<size_t>(rows[i]) : i];
    kernels.axpy_rows[format.type](m.data.data(), m.row_bytes, rows, 0, n, m.k, coefficient.data(),
                                   y.data());
    return y;
  };
  // 8-bit coefficients, one scale for four rows: 1/254 of the largest of four products.
  const double error = (format.block == 1 ? 1e-5 : 1.0 / 254) *
                       std::max(1.0f, 4 * largest(all) * largest(m.values));
  for (double sparsity : {0.0, 0.5, 1.0}) {
    const std::vector<int32_t> rows = choose(m.rows, sparsity);
    const Floats y = run(neon, rows.data(), rows.size());
    close("axpy_rows " + where, y, run(portable_kernels(), rows.data(), rows.size()), error);
    if (sparsity == 0) equal("axpy_rows of all " + where, run(neon, nullptr, m.rows), y);
  }
}

void check_weights(const Kernels& neon) {
  for (const Format& format : kFormats)
    for (size_t k : {1, 7, 31, 32, 33, 96, 256, 576, 1536, 4352}) {  // the last is two slabs
      if (k % format.block != 0) continue;
      for (size_t rows : {1, 7, 8, 31, 32, 33}) {
        if (k > 256 && rows != 7 && rows != 33) continue;  // groups of rows are those of a short k
        const std::string where =
            std::string(format.name) + " " + std::to_string(rows) + " x " + std::to_string(k);
        const Matrix m = random_matrix(format, rows, k);
        check_gemv_rows(neon, format, m, where);
        check_axpy_rows(neon, format, m, where);
        Floats decoded(k);
        neon.decode(format.type, m.data.data(), k, decoded.data());
        equal("decode " + where, decoded, Floats(m.values.begin(), m.values.begin() + k));
      }
    }
}

void check_gemm(const Kernels& neon) {
  for (size_t k : {1, 7, 31, 32, 33, 576})
    for (size_t n : {1, 7, 8, 31, 32})
      for (size_t tokens : {1, 5, 13})
        for (bool add : {false, true}) {
          const Floats rows = normal(n * k), x = normal(tokens * k);
          Floats panel(k * kPanel), same(k * kPanel), y(tokens * n, 1.0f), expected = y;
          portable_kernels().panel_f32(rows.data(), n, k, panel.data());
          neon.panel_f32(rows.data(), n, k, same.data());
          portable_kernels().gemm_f32(panel.data(), n, k, x.data(), k, tokens, add,
                                      expected.data(), n);
          neon.gemm_f32(panel.data(), n, k, x.data(), k, tokens, add, y.data(), n);
          const std::string where = std::to_string(n) + " x " + std::to_string(k);
          equal("panel_f32 " + where, same, panel);
          close("gemm_f32 " + where, y, expected,
                1e-5 * largest(rows) * std::sqrt(static_cast<double>(k)) * 4);
        }
}

void check_vectors(const Kernels& neon) {
  const Kernels& portable = portable_kernels();
  for (size_t n : {1, 7, 8, 31, 32, 33, 576}) {
    const Floats x = normal(n, 8);
    const std::string where = std::to_string(n);
    const auto each = [&](const char* name, const Floats& found, const Floats& expected) {
      for (size_t i = 0; i < n; ++i)
        close(name + where, {found[i]}, {expected[i]}, 2e-6 + 2e-5 * std::fabs(expected[i]));
    };
    Floats y = x, expected = x;
    neon.silu(y.data(), n);
    portable.silu(expected.data(), n);
    each("silu ", y, expected);
    y = expected = x;
    neon.gelu_tanh(y.data(), n);
    portable.gelu_tanh(expected.data(), n);
    each("gelu_tanh ", y, expected);
    y = expected = x;
    float largest, expected_largest;
    const float sum = neon.softmax_numerators(y.data(), n, largest);
    const float expected_sum = portable.softmax_numerators(expected.data(), n, expected_largest);
    each("softmax_numerators ", y, expected);
    close("largest of softmax_numerators " + where, {largest}, {expected_largest}, 0);
    close("sum of softmax_numerators " + where, {sum}, {expected_sum}, 2e-5 * expected_sum);

    const float squares = portable.sum_squares(x.data(), n);
    close("sum_squares " + where, {neon.sum_squares(x.data(), n)}, {squares}, 1e-5 * squares);

    Floats magnitudes = x;
    for (float& value : magnitudes) value = std::fabs(value);
    for (size_t k : {size_t{0}, size_t{1}, n / 2, n})
      equal("topk_threshold " + where, Floats{neon.topk_threshold(magnitudes.data(), n, k)},
            Floats{portable.topk_threshold(magnitudes.data(), n, k)});
  }
}

void check_conversions(const Kernels& neon) {
  // Halves are subnormal below 6.1e-5 and infinite from 65520; 1 + 2^-11 is a tie.
  const Floats x = {0.0f, -0.0f, 1.00048828125f, 1e-5f, -3e-8f, 65519.0f, 65520.0f, -1e9f,
                    std::numeric_limits<float>::infinity(), 0.1f, -2.5f};
  for (size_t n = 1; n <= x.size(); ++n) {
    std::vector<uint16_t> y(n), expected(n);
    neon.to_f16(x.data(), n, y.data());
    portable_kernels().to_f16(x.data(), n, expected.data());
    equal("to_f16 " + std::to_string(n), y, expected);
  }
  for (size_t k : {32, 96, 576}) {
    Floats x = normal(k);
    std::fill(x.begin(), x.begin() + 32, 0.0f);
    const Quantized found(neon, x), expected(portable_kernels(), x);
    equal("quantize: high", found.high, expected.high);
    equal("quantize: low", found.low, expected.low);
    equal("quantize: d", found.d, expected.d);
    equal("quantize: sum", found.sum, expected.sum);
    equal("quantize: sum16", found.sum16, expected.sum16);
  }
}

void check_bits(const Kernels& neon) {
  for (size_t words : {8, 24, 136, 1032}) {  // the last two pass 255 per byte
    std::vector<uint64_t> bits(2 * kBitTile * words);
    for (uint64_t& word : bits) word = uint64_t{rng()} << 32 | rng();
    std::fill_n(bits.begin(), words, ~uint64_t{0});
    std::fill_n(bits.begin() + static_cast<ptrdiff_t>(kBitTile * words), words, ~uint64_t{0});
    const uint64_t *rows[kBitTile], *others[kBitTile];
    for (size_t i = 0; i < kBitTile; ++i) {
      rows[i] = bits.data() + i * words;
      others[i] = bits.data() + (kBitTile + i) * words;
    }
    std::vector<uint32_t> found(kBitTile * kBitTile), expected(kBitTile * kBitTile);
    neon.and_tile(rows, others, words, found.data());
    portable_kernels().and_tile(rows, others, words, expected.data());
    equal("and_tile " + std::to_string(words), found, expected);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const Kernels* neon = count > 1 ? find_kernels(arguments[1]) : nullptr;
  if (!neon) {
    std::puts("this table does not run here");
    return 2;
  }
  broken = count > 2 && std::strcmp(arguments[2], "--break") == 0;
  check_weights(*neon);
  check_gemm(*neon);
  check_vectors(*neon);
  check_conversions(*neon);
  check_bits(*neon);
  std::printf("%d of %d comparisons failed\n", failed, compared);
  return failed > 0;
}
