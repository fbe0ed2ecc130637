// Prefill in bytes, with AVX-512 and VNNI: 64 products per instruction, against 32 in bfloat16.
#include "kernels/shared.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <utility>

#include "kernels/avx512_lanes.h"

namespace fallow {
namespace {

static_assert(kPanel == 2 * kLanes && sizeof(PanelGroup) == kPanel * (32 + 8));

// What 16 rows of a group are: columns [4 c, 4 c + 4) in q[c].
struct LaneBytes {
  __m512i q[8];
  __m512 scale, minimum;

  FALLOW_INLINE void store(PanelGroup& to, size_t first) const {
#pragma GCC unroll 8
    for (size_t c = 0; c < 8; ++c) _mm512_store_si512(to.q[c] + 4 * first, q[c]);
    _mm512_store_ps(to.scale + first, scale);
    _mm512_store_ps(to.minimum + first, minimum);
  }
};

// The block at a byte of t, of a format with blocks of 32.
template <class F, size_t begin>
FALLOW_INLINE LaneBytes bytes_of(const __m512i_u* t) {
  LaneBytes b;
  b.scale = F::template scale<begin>(t);
  if constexpr (F::has_min) {
    b.minimum = F::template minimum<begin>(t);
  } else {
    b.minimum = _mm512_mul_ps(b.scale, _mm512_set1_ps(static_cast<float>(F::offset)));
  }
  [&]<int... c>(std::integer_sequence<int, c...>) {
    ((b.q[c] = F::template quad<begin, c>(t)), ...);
  }(std::make_integer_sequence<int, 8>());
  return b;
}

// Dword i of each of 16 rows at t[i], of `bytes` of the rows from `at` on: as they lie in a tile, or in `own`.
FALLOW_INLINE const __m512i_u* lanes_of(const LaneRows& rows, bool tiled, size_t at, size_t bytes, __m512i* own) {
  if (tiled) return reinterpret_cast<const __m512i_u*>(rows.row[0] + kLanes * at);
  transpose_rows(rows.row, at, bytes, own);
  return own;
}

template <class F>
int panel_of_32(const uint8_t* w, size_t row_bytes, bool tiled, size_t n, size_t k, PanelGroup* panel) {
  for (size_t first = 0; first < kPanel; first += kLanes) {
    if (first >= n) break;
    const LaneRows rows(w, row_bytes, nullptr, 0, first, n);
    __m512i own[(2 * F::bytes + 15) / 16 * 4];
    size_t g = 0;
    for (; g + 2 <= k / 32; g += 2) {  // of two blocks the second begins at another byte of a dword
      const __m512i_u* t = lanes_of(rows, tiled, g * F::bytes, 2 * F::bytes, own);
      bytes_of<F, 0>(t).store(panel[g], first);
      bytes_of<F, F::bytes>(t).store(panel[g + 1], first);
    }
    if (g == k / 32) continue;
    bytes_of<F, 0>(lanes_of(rows, tiled, g * F::bytes, F::bytes, own)).store(panel[g], first);
  }
  return kBits<F>;
}

template <class F>
int panel_of_k(const uint8_t* w, size_t row_bytes, bool tiled, size_t n, size_t k, PanelGroup* panel) {
  for (size_t first = 0; first < kPanel; first += kLanes) {
    if (first >= n) break;
    const LaneRows rows(w, row_bytes, nullptr, 0, first, n);
    __m512i own[F::bytes / 4];
    for (size_t g = 0; g < k / 32; g += 8) {
      const __m512i_u* t = lanes_of(rows, tiled, g / 8 * F::bytes, F::bytes, own);
      const KScales scales(t);
      const auto pair = [&]<int p>() {
        LaneBytes low, high;
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) F::template quads<p>(t, c, low.q[c], high.q[c]);
        low.scale = scales.scale<2 * p>();
        low.minimum = scales.minimum<2 * p>();
        high.scale = scales.scale<2 * p + 1>();
        high.minimum = scales.minimum<2 * p + 1>();
        low.store(panel[g + 2 * p], first);
        high.store(panel[g + 2 * p + 1], first);
      };
      pair.template operator()<0>();
      pair.template operator()<1>();
      pair.template operator()<2>();
      pair.template operator()<3>();
    }
  }
  return kBits<F>;
}

// Columns of W are rows of W^T: their lanes need no transposition. In a lane 32 weights have as many
// scales, so they are rounded once more, with one.
int columns_bytes(const float* rows, size_t stride, size_t n, PanelGroup& panel) {
  for (size_t first = 0; first < n; first += kLanes, rows += kLanes) {
    const __mmask16 lanes = first_lanes(n - first);
    const auto row = [&](size_t r) { return _mm512_maskz_loadu_ps(lanes, rows + r * stride); };
    __m512 largest = _mm512_setzero_ps();
    for (size_t r = 0; r < 32; ++r) largest = max_abs(largest, row(r));
    const __m512 most = _mm512_set1_ps(127);
    const __m512 inverse =
        _mm512_maskz_div_ps(_mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ), most, largest);
    const auto whole = [&](size_t r) { return _mm512_cvtps_epi32(_mm512_mul_ps(row(r), inverse)); };
    LaneBytes b;
    for (size_t c = 0; c < 8; ++c) {
      const auto merge = [](__m512i low, __m512i high, int bits, __mmask64 bytes) {
        return _mm512_mask_blend_epi8(bytes, low, _mm512_slli_epi32(high, bits));
      };
      const __m512i even = merge(whole(4 * c), whole(4 * c + 1), 8, 0x2222222222222222);
      const __m512i odd = merge(whole(4 * c + 2), whole(4 * c + 3), 8, 0x2222222222222222);
      const __m512i four = merge(even, odd, 16, 0xCCCCCCCCCCCCCCCC);
      b.q[c] = _mm512_xor_si512(four, _mm512_set1_epi8(-128));
    }
    b.scale = _mm512_div_ps(largest, most);
    b.minimum = _mm512_mul_ps(b.scale, _mm512_set1_ps(128));
    b.store(panel, first);
  }
  return 8;
}

void to_bytes(const float* x, size_t k, int8_t* q, float* d, float* sum) {
  for (size_t g = 0; g < k / 32; ++g) {
    const __m512 first = _mm512_loadu_ps(x + 32 * g), second = _mm512_loadu_ps(x + 32 * g + 16);
    const __m512 either = max_abs(_mm512_abs_ps(first), second);
    const float largest = largest_of(either);
    d[g] = largest / 127;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0.0f);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 32 * g), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 32 * g + 16), _mm512_cvtepi32_epi8(b));
    sum[g] = d[g] * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(a, b)));
  }
}

// Six tokens keep 24 sums in registers, integers of a group and floats of all. On Zen 4 that was 162
// billion products per second and core of 229 that its byte instruction could do alone; scales and
// minima take 3 instructions in 11.
template <int tokens>
void gemm_bytes_tile(const PanelGroup* panel, size_t n, size_t k, const ByteTokens& x, size_t token,
                     bool add, float* y, size_t stride) {
  const int8_t* q = x.q + token * x.stride;
  const float *d = x.d + token * (x.stride / 32), *minus = x.sum + token * (x.stride / 32);
  __m512 sum[2][tokens];
  for (int t = 0; t < tokens; ++t) sum[0][t] = sum[1][t] = _mm512_setzero_ps();
  for (size_t g = 0; g < k / 32; ++g, ++panel, q += 32) {
    __m512i whole[2][tokens];
    for (int t = 0; t < tokens; ++t) whole[0][t] = whole[1][t] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (size_t c = 0; c < 8; ++c) {
      const __m512i low = _mm512_load_si512(panel->q[c]), high = _mm512_load_si512(panel->q[c] + 64);
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const __m512i v = four_of(q + static_cast<size_t>(t) * x.stride + 4 * c);
        whole[0][t] = _mm512_dpbusd_epi32(whole[0][t], low, v);
        whole[1][t] = _mm512_dpbusd_epi32(whole[1][t], high, v);
      }
    }
#pragma GCC unroll 2
    for (size_t h = 0; h < 2; ++h) {
      const __m512 scale = _mm512_load_ps(panel->scale + 16 * h);
      const __m512 minimum = _mm512_load_ps(panel->minimum + 16 * h);
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const size_t at = static_cast<size_t>(t) * (x.stride / 32) + g;
        const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(d[at]));
        sum[h][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[h][t]), scaled, sum[h][t]);
        sum[h][t] = _mm512_fnmadd_ps(minimum, _mm512_set1_ps(minus[at]), sum[h][t]);
      }
    }
  }
  store_panel(sum, n, add, y, stride);
}

void gemm_bytes(const PanelGroup* panel, int, size_t n, size_t k, const ByteTokens& x, size_t tokens,
                bool add, float* y, size_t stride) {
  in_groups<6>(tokens, [&]<size_t count>(size_t t) {
    gemm_bytes_tile<static_cast<int>(count)>(panel, n, k, x, t, add, y + t * stride, stride);
  });
}

}  // namespace

void add_bytes(Kernels& table) {
  table.panel_bytes[kQ4_0] = panel_of_32<LanesOf32<Q4_0>>;
  table.panel_bytes[kQ4_1] = panel_of_32<LanesOf32<Q4_1>>;
  table.panel_bytes[kQ5_0] = panel_of_32<LanesOf32<Q5_0>>;
  table.panel_bytes[kQ5_1] = panel_of_32<LanesOf32<Q5_1>>;
  table.panel_bytes[kQ8_0] = panel_of_32<LanesOf32<Q8_0>>;
  table.panel_bytes[kQ4_K] = panel_of_k<Block4_K>;
  table.panel_bytes[kQ5_K] = panel_of_k<Block5_K>;
  table.columns_bytes = columns_bytes;
  table.to_bytes = to_bytes;
  table.gemm_bytes = gemm_bytes;
}

}  // namespace fallow

#endif
