// Prefill in bytes, with AVX-512 and VNNI: 64 products per instruction, against 32 in bfloat16.
#include "kernels/shared.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include <utility>

#include "kernels/avx512_bytes.h"
#include "kernels/avx512_lanes.h"

namespace fallow {
namespace {

static_assert(kPanel == 2 * kLanes);

// The nearest bfloat16, ties to even, in the high half of each lane.
FALLOW_INLINE __m512i round_to_high(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  return _mm512_and_si512(rounded, _mm512_set1_epi32(-0x10000));
}
FALLOW_INLINE __m512i pair_of(__m512 low, __m512 high) {
  return _mm512_or_si512(_mm512_srli_epi32(round_to_high(low), 16), round_to_high(high));
}

// What 16 rows of a group are: columns [4 c, 4 c + 4) in p[c].
struct LaneBytes {
  __m512i p[8];
  __m512 s, m;

  FALLOW_INLINE void store(PanelGroup& to, size_t first) const {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (size_t c = 0; c < 8; ++c) {
      _mm512_store_si512(to.p[c] + 4 * first, p[c]);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), p[c]);
    }
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7));
    _mm512_store_si512(to.start + first, start);
    _mm512_store_ps(to.s + first, s);
    const __m512 all = _mm512_fmadd_ps(s, _mm512_cvtepi32_ps(sum), _mm512_mul_ps(m, _mm512_set1_ps(32)));
    _mm512_store_si512(to.rest + first, pair_of(all, m));
  }
};

// Bits 0..3 of each dword to bit 4 of its bytes.
FALLOW_INLINE __m512i spread_fifth(__m512i bits) {
  const __m512i four = _mm512_and_si512(bits, _mm512_set1_epi32(15));
  return _mm512_slli_epi32(_mm512_mullo_epi32(four, _mm512_set1_epi32(0x00204081)), 4);
}

template <class F>
FALLOW_INLINE __m512i centred(__m512i p) {
  return _mm512_sub_epi8(p, _mm512_set1_epi8(static_cast<char>(F::centre)));
}

// The block at a byte of t, of a format with blocks of 32.
template <class F, size_t begin>
FALLOW_INLINE LaneBytes bytes_of(const __m512i* t) {
  LaneBytes b;
  b.s = half_at<begin>(t);
  if constexpr (F::has_min) {
    b.m = _mm512_fmadd_ps(b.s, _mm512_set1_ps(static_cast<float>(F::centre)), half_at<begin + 2>(t));
  } else {
    static_assert(F::centre == F::offset);
    b.m = _mm512_setzero_ps();
  }
  constexpr size_t head = F::has_min ? 4 : 2, body = F::bytes - (F::centre == 128 ? 32 : 16);
  const auto quad = [&]<size_t c>() {
    if constexpr (F::centre == 128) {
      return dword_at<begin + head + 4 * c>(t);
    } else {
      const __m512i v = dword_at<begin + body + 4 * (c % 4)>(t);
      const __m512i nibbles = c < 4 ? low_nibbles(v) : high_nibbles(v);
      if constexpr (F::centre == 8) return centred<F>(nibbles);
      const __m512i fifth = spread_fifth(_mm512_srli_epi32(dword_at<begin + head>(t), 4 * c));
      return centred<F>(with_fifth(nibbles, fifth));
    }
  };
  [&]<size_t... c>(std::index_sequence<c...>) {
    ((b.p[c] = quad.template operator()<c>()), ...);
  }(std::make_index_sequence<8>());
  return b;
}

template <class F>
void panel_of_32(const uint8_t* w, size_t row_bytes, size_t n, size_t k, PanelGroup* panel) {
  for (size_t first = 0; first < kPanel; first += kLanes) {
    if (first >= n) break;
    const LaneRows rows(w, row_bytes, nullptr, 0, first, n);
    __m512i t[(2 * F::bytes + 15) / 16 * 4];
    size_t g = 0;
    for (; g + 2 <= k / 32; g += 2) {  // of two blocks the second begins at another byte of a dword
      transpose_rows(rows.row, g * F::bytes, 2 * F::bytes, t);
      bytes_of<F, 0>(t).store(panel[g], first);
      bytes_of<F, F::bytes>(t).store(panel[g + 1], first);
    }
    if (g == k / 32) continue;
    transpose_rows(rows.row, g * F::bytes, F::bytes, t);
    bytes_of<F, 0>(t).store(panel[g], first);
  }
}

template <class F>
void panel_of_k(const uint8_t* w, size_t row_bytes, size_t n, size_t k, PanelGroup* panel) {
  for (size_t first = 0; first < kPanel; first += kLanes) {
    if (first >= n) break;
    const LaneRows rows(w, row_bytes, nullptr, 0, first, n);
    __m512i t[F::bytes / 4];
    for (size_t g = 0; g < k / 32; g += 8) {
      transpose_rows(rows.row, g / 8 * F::bytes, F::bytes, t);
      const KScales scales(t);
      const auto pair = [&]<int p>() {
        LaneBytes low, high;
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) {
          F::template quads<p>(t, c, low.p[c], high.p[c]);
          low.p[c] = centred<F>(low.p[c]);
          high.p[c] = centred<F>(high.p[c]);
        }
        const __m512 centre = _mm512_set1_ps(static_cast<float>(F::centre));
        low.s = scales.scale<2 * p>();
        low.m = _mm512_fmsub_ps(low.s, centre, scales.minimum<2 * p>());
        high.s = scales.scale<2 * p + 1>();
        high.m = _mm512_fmsub_ps(high.s, centre, scales.minimum<2 * p + 1>());
        low.store(panel[g + 2 * p], first);
        high.store(panel[g + 2 * p + 1], first);
      };
      pair.template operator()<0>();
      pair.template operator()<1>();
      pair.template operator()<2>();
      pair.template operator()<3>();
    }
  }
}

// Columns of W are rows of W^T: their lanes need no transposition. In a lane 32 weights have as many
// scales, so they are rounded once more, with one.
void columns_bytes(const float* rows, size_t stride, size_t n, PanelGroup& panel) {
  for (size_t first = 0; first < kPanel && first < n; first += kLanes, rows += kLanes) {
    const __mmask16 lanes = first_lanes(n - first);
    const auto row = [&](size_t r) { return _mm512_maskz_loadu_ps(lanes, rows + r * stride); };
    __m512 least = row(0), most = least;
    for (size_t r = 1; r < 32; ++r) {
      least = _mm512_min_ps(least, row(r));
      most = _mm512_max_ps(most, row(r));
    }
    const __m512 steps = _mm512_set1_ps(127);
    LaneBytes b;
    const __m512 middle = _mm512_mul_ps(_mm512_add_ps(most, least), _mm512_set1_ps(0.5f));
    b.m = _mm512_castsi512_ps(round_to_high(middle));
    const __m512 largest = _mm512_max_ps(_mm512_sub_ps(most, b.m), _mm512_sub_ps(b.m, least));
    b.s = _mm512_div_ps(largest, steps);
    const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, steps, largest);
    const auto byte = [&](size_t r) {
      const __m512i p = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(row(r), b.m), inverse));
      return _mm512_and_si512(p, _mm512_set1_epi32(255));
    };
    for (size_t c = 0; c < 8; ++c) {
      const auto merge = [](__m512i low, __m512i high, int bits) {
        return _mm512_or_si512(low, _mm512_slli_epi32(high, bits));
      };
      const __m512i even = merge(byte(4 * c), byte(4 * c + 1), 8);
      b.p[c] = merge(even, merge(byte(4 * c + 2), byte(4 * c + 3), 8), 16);
    }
    b.store(panel, first);
  }
}

void to_bytes(const float* x, size_t k, uint8_t* q, float* d, uint32_t* rest) {
  const __m512i zero = _mm512_set1_epi32(128);
  for (size_t g = 0; g < k / 32; ++g, x += 32, q += 32) {
    const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(first, second));
    const float least = _mm512_reduce_min_ps(_mm512_min_ps(first, second));
    const __m512 z = _mm512_castsi512_ps(round_to_high(_mm512_set1_ps((most + least) / 2)));
    const float middle = _mm512_cvtss_f32(z);
    const float largest = most - middle > middle - least ? most - middle : middle - least;
    d[g] = largest / 127;
    const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127 / largest : 0.0f);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(first, z), inverse));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(second, z), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(_mm512_add_epi32(a, zero)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(_mm512_add_epi32(b, zero)));
    const float sum = d[g] * static_cast<float>(_mm512_reduce_add_epi32(_mm512_add_epi32(a, b)));
    rest[g] = static_cast<uint32_t>(
        _mm_cvtsi128_si32(_mm512_castsi512_si128(pair_of(z, _mm512_set1_ps(sum)))));
  }
}

// Without an instruction for pairs of bfloat16.
struct Halves {
  __m512 low, high;

  FALLOW_INLINE explicit Halves(__m512i pair)
      : low(_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))),
        high(_mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-0x10000)))) {}
  FALLOW_INLINE __m512 add_product(__m512 sum, __m512i pair) const {
    const Halves other(pair);
    return _mm512_fmadd_ps(low, other.low, _mm512_fmadd_ps(high, other.high, sum));
  }
};

}  // namespace

void add_bytes(Kernels& table) {
  table.panel_bytes[kQ4_0] = panel_of_32<Q4_0>;
  table.panel_bytes[kQ4_1] = panel_of_32<Q4_1>;
  table.panel_bytes[kQ5_0] = panel_of_32<Q5_0>;
  table.panel_bytes[kQ5_1] = panel_of_32<Q5_1>;
  table.panel_bytes[kQ8_0] = panel_of_32<Q8_0>;
  table.panel_bytes[kQ4_K] = panel_of_k<Block4_K>;
  table.panel_bytes[kQ5_K] = panel_of_k<Block5_K>;
  table.columns_bytes = columns_bytes;
  table.to_bytes = to_bytes;
  table.gemm_bytes = gemm_bytes_with<Halves>;
}

}  // namespace fallow

#endif
