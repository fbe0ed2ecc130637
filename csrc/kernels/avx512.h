// What the AVX-512 files use. Include only there.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <utility>

#include "kernels/shared.h"

namespace fallow {

void add_bytes(Kernels& table);  // avx512_bytes.cpp

namespace {

FALLOW_INLINE __mmask16 first_lanes(size_t n) {
  return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1);
}

// Columns that products take together: one block of the K formats, eight of the others.
constexpr size_t kSpan = 256;

// The n rows of a panel for some tokens: y[t * stride + 16 h + lane] (+)= sum[h][t].
template <int tokens>
FALLOW_INLINE void store_panel(__m512 (&sum)[2][tokens], size_t n, bool add, float* y, size_t stride) {
  for (int t = 0; t < tokens; ++t)
    for (size_t h = 0; h < 2 && 16 * h < n; ++h) {
      const __mmask16 lanes = first_lanes(n - 16 * h);
      float* to = y + static_cast<size_t>(t) * stride + 16 * h;
      if (add) sum[h][t] = _mm512_add_ps(sum[h][t], _mm512_maskz_loadu_ps(lanes, to));
      _mm512_mask_storeu_ps(to, lanes, sum[h][t]);
    }
}

// The larger of a >= 0 and |b|: as integers, of which NaN's is the largest.
FALLOW_INLINE __m512 max_abs(__m512 a, __m512 b) {
  return _mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(_mm512_abs_ps(b))));
}
// Of lanes >= 0, likewise.
FALLOW_INLINE float largest_of(__m512 v) {
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(v));
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof largest);
  return largest;
}

// Four parts of a register.
FALLOW_INLINE __m512i side_by_side(__m128i a, __m128i b, __m128i c, __m128i d) {
  __m512i v = _mm512_castsi128_si512(a);
  v = _mm512_mask_broadcast_i32x4(v, 0x00F0, b);
  v = _mm512_mask_broadcast_i32x4(v, 0x0F00, c);
  return _mm512_mask_broadcast_i32x4(v, 0xF000, d);
}

// out[c] = dword c of each of the 16 registers.
FALLOW_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // lane l of r[4 q + i] holds dword 4 l + i of rows 4 q..4 q + 3
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xEE);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[8 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

}  // namespace
}  // namespace fallow
