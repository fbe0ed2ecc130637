// The product of prefill in bytes, for processors with and without products of bfloat16.
#pragma once

#include <utility>

#include "kernels/avx512.h"

namespace fallow {
namespace {

FALLOW_INLINE __m512i broadcast_dword(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return _mm512_set1_epi32(v);
}

// `Rest` holds 16 rows' pairs and adds their products with a token's. Six tokens keep 24 sums in
// registers, integers of a group and floats of all. On Zen 4 that is 162 billion products per second and
// core, of 229 by the instruction for bytes alone; one in bfloat16 has 110.
template <class Rest, int tokens>
void gemm_bytes_tile(const PanelGroup* panel, size_t n, size_t k, const ByteTokens& x, size_t token,
                     bool add, float* y, size_t stride) {
  const uint8_t* q = x.q + token * x.stride;
  const size_t groups = x.stride / 32;
  __m512 sum[2][tokens];
  for (int t = 0; t < tokens; ++t) sum[0][t] = sum[1][t] = _mm512_setzero_ps();
  for (size_t g = 0; g < k / 32; ++g, ++panel, q += 32) {
    __m512i whole[2][tokens];
    for (int t = 0; t < tokens; ++t) {
      whole[0][t] = _mm512_load_si512(panel->start);
      whole[1][t] = _mm512_load_si512(panel->start + 16);
    }
#pragma GCC unroll 1
    for (size_t c = 0; c < 8; ++c) {
      const __m512i first = _mm512_load_si512(panel->p[c]), second = _mm512_load_si512(panel->p[c] + 64);
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const __m512i v = broadcast_dword(q + static_cast<size_t>(t) * x.stride + 4 * c);
        whole[0][t] = _mm512_dpbusd_epi32(whole[0][t], v, first);
        whole[1][t] = _mm512_dpbusd_epi32(whole[1][t], v, second);
      }
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      const __m512 s = _mm512_load_ps(panel->s + 16 * h);
      const Rest rest(_mm512_load_si512(panel->rest + 16 * h));
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const size_t at = (token + static_cast<size_t>(t)) * groups + g;
        const __m512 scale = _mm512_mul_ps(s, _mm512_set1_ps(x.d[at]));
        sum[h][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[h][t]), scale, sum[h][t]);
        sum[h][t] = rest.add_product(sum[h][t], broadcast_dword(x.rest + at));
      }
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (size_t h = 0; h < 2 && 16 * h < n; ++h) {
      const __mmask16 lanes = first_lanes(n - 16 * h);
      float* to = y + static_cast<size_t>(t) * stride + 16 * h;
      if (add) sum[h][t] = _mm512_add_ps(sum[h][t], _mm512_maskz_loadu_ps(lanes, to));
      _mm512_mask_storeu_ps(to, lanes, sum[h][t]);
    }
}

template <class Rest>
void gemm_bytes_with(const PanelGroup* panel, size_t n, size_t k, const ByteTokens& x, size_t tokens,
                     bool add, float* y, size_t stride) {
  constexpr int tile = 6;
  size_t t = 0;
  for (; t + tile <= tokens; t += tile)
    gemm_bytes_tile<Rest, tile>(panel, n, k, x, t, add, y + t * stride, stride);
  const auto rest = [&]<int left>() {
    if (tokens - t == left)
      gemm_bytes_tile<Rest, left>(panel, n, k, x, t, add, y + t * stride, stride);
  };
  if (t == tokens) return;
  [&]<int... left>(std::integer_sequence<int, left...>) {
    (rest.template operator()<left + 1>(), ...);
  }(std::make_integer_sequence<int, tile - 1>());
}

}  // namespace
}  // namespace fallow
