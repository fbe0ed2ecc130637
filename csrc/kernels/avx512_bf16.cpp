// AVX-512 with bfloat16 products: prefill with half the bytes and twice the weights per instruction.
#include "kernels/shared.h"

#if defined(__AVX512BF16__)

#include <type_traits>

#include "kernels/avx512.h"

namespace fallow {
namespace {

__m256i to_bf16_16(__m512 v) {
  return std::bit_cast<__m256i>(_mm512_cvtneps_pbh(v));
}

void to_bf16(const float* x, size_t n, uint16_t* y) {
  for (size_t i = 0; i < n; i += 16) {
    const __mmask16 lanes = first_lanes(n - i);
    _mm256_mask_storeu_epi16(y + i, lanes, to_bf16_16(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

void panel_bf16(const float* rows, size_t n, size_t k, uint16_t* panel) {
  for (size_t j = 0; j < k; j += 32)
    for (size_t half = 0; half < kPanel; half += 16) {
      __m512i block[16];  // of each row 16 pairs
      for (size_t r = 0; r < 16; ++r) {
        const float* row = rows + (half + r) * k + j;
        block[r] = _mm512_setzero_si512();
        if (half + r >= n) continue;
        const __m512 first = _mm512_maskz_loadu_ps(first_lanes(k - j), row);
        const __m512 second =
            k - j > 16 ? _mm512_maskz_loadu_ps(first_lanes(k - j - 16), row + 16) : __m512{};
        block[r] = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
      }
      transpose16(block);
      for (size_t c = 0; c < 16 && j + 2 * c < k; ++c)
        _mm512_storeu_si512(panel + ((j / 2 + c) * kPanel + half) * 2, block[c]);
    }
}

void pair_bf16(const float* first, const float* second, size_t n, uint16_t* panel) {
  for (size_t r = 0; r < kPanel; r += 16) {
    const __mmask16 lanes = r < n ? first_lanes(n - r) : 0;
    const __m512i a = _mm512_cvtepu16_epi32(to_bf16_16(_mm512_maskz_loadu_ps(lanes, first + r)));
    const __m512i b = _mm512_cvtepu16_epi32(to_bf16_16(_mm512_maskz_loadu_ps(lanes, second + r)));
    _mm512_storeu_si512(panel + 2 * r, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
  }
}

template <int tokens>
void gemm_bf16_tile(const uint16_t* panel, size_t n, size_t k, const uint16_t* x, size_t x_stride,
                    bool add, float* y, size_t stride) {
  __m512 sum[2][tokens];
  for (int t = 0; t < tokens; ++t) sum[0][t] = sum[1][t] = _mm512_setzero_ps();
  for (size_t j = 0; j < k; j += 2) {
    const auto low = std::bit_cast<__m512bh>(_mm512_loadu_si512(panel + j * kPanel));
    const auto high = std::bit_cast<__m512bh>(_mm512_loadu_si512(panel + j * kPanel + 32));
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
      const uint32_t pair =
          load_u32(reinterpret_cast<const uint8_t*>(x + static_cast<size_t>(t) * x_stride + j));
      const auto v = std::bit_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)));
      sum[0][t] = _mm512_dpbf16_ps(sum[0][t], low, v);
      sum[1][t] = _mm512_dpbf16_ps(sum[1][t], high, v);
    }
  }
  store_panel(sum, n, add, y, stride);
}

void gemm_bf16(const uint16_t* panel, size_t n, size_t k, const uint16_t* x, size_t x_stride,
               size_t tokens, bool add, float* y, size_t stride) {
  const auto tile = [&](auto size, size_t t) {
    gemm_bf16_tile<decltype(size)::value>(panel, n, k, x + t * x_stride, x_stride, add,
                                          y + t * stride, stride);
  };
  size_t t = 0;
  for (; t + 12 <= tokens; t += 12) tile(std::integral_constant<int, 12>{}, t);
  for (; t + 4 <= tokens; t += 4) tile(std::integral_constant<int, 4>{}, t);
  for (; t < tokens; ++t) tile(std::integral_constant<int, 1>{}, t);
}

Kernels make() {
  Kernels table = *avx512_kernels();
  table.name = "avx512_bf16";
  table.panel_bf16 = panel_bf16;
  table.pair_bf16 = pair_bf16;
  table.to_bf16 = to_bf16;
  table.gemm_bf16 = gemm_bf16;
  return table;
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const bool runs = avx512_kernels() && __builtin_cpu_supports("avx512bf16");
  if (!runs) return nullptr;
  static const Kernels table = make();
  return &table;
}

}  // namespace fallow

#else

namespace fallow {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace fallow

#endif
