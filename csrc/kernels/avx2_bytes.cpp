// Prefill in bytes, with AVX2: 32 products per instruction, against 8 in floats. Two of them add up in 16
// bits, which hold eight times as much of weights of four bits, four times of five, and of eight bits
// nothing else: those cost three more instructions.
#include "kernels/shared.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "kernels/avx2_lanes.h"

namespace fallow {
namespace {

static_assert(kPanel == 4 * kLanes);

FALLOW_INLINE __m256i bytes_as_signed(__m256i v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }

// Rows [first, first + 8) of the groups of one block.
template <class F, class Rows>
FALLOW_INLINE void panel_block_split(const Rows& rows, PanelGroup* panel, size_t first) {
  const typename F::Scales scales(rows);
  __m256i tops[F::top_pieces * 4 + 1];
  F::tops(rows, tops);
  const auto store = [&](size_t column, __m256i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel[column / 32].q[column % 32 / 4] + 4 * first), v);
  };
  unrolled<F::pieces>([&]<int i>() {
    __m256i v[4];
    rows.load(F::at(i), v);
#pragma GCC unroll 4
    for (size_t q = 0; q < 4; ++q) {
      __m256i a, b;
      F::template split<i, 4>(tops, q, v[q], a, b);
      store(F::low(i) + 4 * q, a);
      store(F::low(i) + F::apart + 4 * q, b);
    }
  });
  unrolled<F::block / 32>([&]<int g>() {
    const __m256 factor = _mm256_set1_ps(F::has_min ? 1.0f : static_cast<float>(F::offset));
    _mm256_storeu_ps(panel[g].scale + first, scales.template scale<g>());
    _mm256_storeu_ps(panel[g].minimum + first, _mm256_mul_ps(scales.template minimum<g>(), factor));
  });
}

template <class F, class Rows>
FALLOW_INLINE void panel_block_signed(const Rows& rows, PanelGroup* panel, size_t first) {
  const typename F::Scales scales(rows);
  unrolled<F::block / 32>([&]<int g>() {
    unrolled<F::raws>([&]<int i>() {
      __m256i v[4];
      rows.load(F::at(g, i), v);
      unrolled<F::parts>([&]<int part>() {
#pragma GCC unroll 4
        for (size_t q = 0; q < 4; ++q)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel[g].q[4 * (i + part) + q] + 4 * first),
                              bytes_as_signed(F::template bytes_of<part>(v[q])));
      });
    });
    const __m256 scale = scales.template scale<g>();
    _mm256_storeu_ps(panel[g].scale + first, scale);
    _mm256_storeu_ps(panel[g].minimum + first, _mm256_mul_ps(scale, _mm256_set1_ps(128)));
  });
}

template <class F, class Rows>
FALLOW_INLINE void panel_block(const Rows& rows, PanelGroup* panel, size_t first) {
  if constexpr (kIsSigned<F>) {
    panel_block_signed<F>(rows, panel, first);
  } else {
    panel_block_split<F>(rows, panel, first);
  }
}

// Calls some(rows, first) for every 8 of n rows; past the end the last one stands in.
template <class Some>
void for_lanes(const uint8_t* w, size_t row_bytes, size_t n, const Some& some) {
  for (size_t first = 0; first < n; first += kLanes) {
    const uint8_t* rows[kLanes];
    for (size_t r = 0; r < kLanes; ++r) rows[r] = w + (first + r < n ? first + r : n - 1) * row_bytes;
    some(rows, first);
  }
}

template <class F>
int panel_of(const uint8_t* w, size_t row_bytes, bool tiled, size_t n, size_t k, PanelGroup* panel) {
  if (tiled) {
    for (size_t first = 0; first < n; first += kLanes) {
      const uint8_t* tile = w + first / kTileRows * kTileRows * row_bytes + first % kTileRows * 4;
      for_blocks_of_tile<F>(tile, k, [&]<bool odd>(const uint8_t* block, size_t at) __attribute__((always_inline)) {
        panel_block<F>(InTile<odd>{block}, panel + at / 32, first);
      });
    }
    return kBits<F>;
  }
  for_lanes(w, row_bytes, n, [&](const uint8_t** rows, size_t first) {
    for (size_t g = 0; g < k / 32; g += F::block / 32) {
      panel_block<F>(InLanes{rows}, panel + g, first);
      for (size_t r = 0; r < kLanes; ++r) rows[r] += F::bytes;
    }
  });
  return kBits<F>;
}

FALLOW_INLINE __m256 max_abs(__m256 largest, __m256 v) {
  return max_of(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
}

// most / largest, 0 of 0.
FALLOW_INLINE __m256 inverse_of(__m256 largest, float most) {
  const __m256 there = _mm256_cmp_ps(largest, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_and_ps(there, _mm256_div_ps(_mm256_set1_ps(most), largest));
}

FALLOW_INLINE __m256i whole(__m256 v, __m256 inverse) { return _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)); }

// Rounded once more, since 32 weights of a column have as many scales; to seven bits, whose products 16
// bits hold.
int columns_bytes(const float* rows, size_t stride, size_t n, PanelGroup& panel) {
  alignas(32) float last[32][kLanes] = {};
  for (size_t first = 0; first < n; first += kLanes, rows += kLanes) {
    const float* from = rows;
    size_t step = stride;
    if (n - first < kLanes) {
      for (size_t r = 0; r < 32; ++r)
        for (size_t i = 0; i < n - first; ++i) last[r][i] = rows[r * stride + i];
      from = last[0];
      step = kLanes;
    }
    const auto row = [&](size_t r) { return _mm256_loadu_ps(from + r * step); };
    __m256 largest = _mm256_setzero_ps();
    for (size_t r = 0; r < 32; ++r) largest = max_abs(largest, row(r));
    const __m256 inverse = inverse_of(largest, 63);
    for (size_t c = 0; c < 8; ++c) {
      __m256i four = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (size_t i = 4; i-- > 0;)
        four = _mm256_add_epi32(_mm256_slli_epi32(four, 8),
                                _mm256_add_epi32(whole(row(4 * c + i), inverse), _mm256_set1_epi32(64)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel.q[c] + 4 * first), four);
    }
    const __m256 scale = _mm256_mul_ps(largest, _mm256_set1_ps(1.0f / 63));
    _mm256_storeu_ps(panel.scale + first, scale);
    _mm256_storeu_ps(panel.minimum + first, _mm256_mul_ps(scale, _mm256_set1_ps(64)));
  }
  return 7;
}

void to_bytes(const float* x, size_t k, int8_t* q, float* d, float* sum) {
  for (size_t g = 0; g < k / 32; ++g) {
    __m256 v[4], largest = _mm256_setzero_ps();
    for (size_t i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + 32 * g + 8 * i);
      largest = max_abs(largest, v[i]);
    }
    largest = largest_lane(largest);
    const __m256 inverse = inverse_of(largest, 127);
    const __m256i first = _mm256_packs_epi32(whole(v[0], inverse), whole(v[1], inverse));
    const __m256i second = _mm256_packs_epi32(whole(v[2], inverse), whole(v[3], inverse));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second),
                                                      _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 32 * g), bytes);
    d[g] = _mm256_cvtss_f32(largest) * (1.0f / 127);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    sum[g] = d[g] * static_cast<float>(sum_lanes(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
}

// 16 rows of a group times `tokens` columns of x, q[t * stride].
template <int bits, size_t tokens>
FALLOW_INLINE void multiply_group(const uint8_t* panel, const int8_t* q, size_t stride, __m256i (&all)[tokens][2]) {
  constexpr size_t most = bits == 4 ? 8 : bits == 5 ? 4 : 1;  // products that 16 bits hold
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i some[tokens][2];
#pragma GCC unroll 8
  for (size_t c = 0; c < 8; ++c) {
    const uint8_t* from = panel + 4 * kPanel * c;
    __m256i weights[2] = {load256(from), load256(from + 32)}, magnitude[2];
    for (size_t h = 0; bits == 8 && h < 2; ++h) {
      weights[h] = now(bytes_as_signed(weights[h]));
      magnitude[h] = _mm256_abs_epi8(weights[h]);
    }
#pragma GCC unroll 4
    for (size_t t = 0; t < tokens; ++t) {
      const __m256i v = four_of(q + t * stride + 4 * c);
#pragma GCC unroll 2
      for (size_t h = 0; h < 2; ++h) {
        __m256i product = bits == 8 ? _mm256_maddubs_epi16(magnitude[h], _mm256_sign_epi8(v, weights[h]))
                                    : _mm256_maddubs_epi16(weights[h], v);
        if constexpr (most > 1) {
          some[t][h] = now(c % most == 0 ? product : _mm256_add_epi16(some[t][h], product));
          product = some[t][h];
        }
        if (c % most < most - 1) continue;
        const __m256i wide = _mm256_madd_epi16(product, ones);
        all[t][h] = now(c < most ? wide : _mm256_add_epi32(all[t][h], wide));
      }
    }
  }
}

// 16 rows of a panel, of which n exist.
template <int bits, size_t tokens>
void multiply_rows(const PanelGroup* panel, size_t first, size_t n, size_t k, const ByteTokens& x, size_t token,
                   bool add, float* y, size_t stride) {
  const size_t groups = x.stride / 32;
  const int8_t* q = x.q + token * x.stride;
  const float *d = x.d + token * groups, *minus = x.sum + token * groups;
  alignas(32) float sums[tokens][2 * kLanes];  // written below: = {} becomes a `rep stos`, which takes as long
                                               // as two groups
  unrolled<static_cast<int>(tokens)>([&]<int t>() {
    for (size_t h = 0; h < 2 * kLanes; h += kLanes) _mm256_store_ps(sums[t] + h, _mm256_setzero_ps());
  });
  for (size_t g = 0; g < k / 32; ++g, ++panel, q += 32) {
    __m256i all[tokens][2];
    multiply_group<bits, tokens>(panel->q[0] + 4 * first, q, x.stride, all);
    // In registers they would take those of the integers.
    asm volatile("" : : "r"(sums) : "memory");
    for (size_t h = 0; h < 2 * kLanes; h += kLanes) {
      const __m256 scale = _mm256_load_ps(panel->scale + first + h);
      const __m256 minimum = _mm256_load_ps(panel->minimum + first + h);
      for (size_t t = 0; t < tokens; ++t) {
        const __m256 scaled = _mm256_mul_ps(scale, _mm256_set1_ps(d[t * groups + g]));
        __m256 sum = _mm256_load_ps(sums[t] + h);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(all[t][h / kLanes]), scaled, sum);
        // Weights of eight bits have signs here, and no need of minima.
        if (bits != 8) sum = _mm256_fnmadd_ps(minimum, _mm256_set1_ps(minus[t * groups + g]), sum);
        _mm256_store_ps(sums[t] + h, sum);
      }
    }
  }
  for (size_t t = 0; t < tokens; ++t) {
    float* to = y + t * stride;
    if (n == 2 * kLanes) {
      for (size_t h = 0; h < n; h += kLanes) {
        const __m256 sum = _mm256_load_ps(sums[t] + h);
        _mm256_storeu_ps(to + h, add ? _mm256_add_ps(_mm256_loadu_ps(to + h), sum) : sum);
      }
    } else {
      for (size_t r = 0; r < n; ++r) to[r] = add ? to[r] + sums[t][r] : sums[t][r];
    }
  }
}

// As many groups at a time as the first cache holds beside some tokens, in equal parts.
template <int bits>
void multiply(const PanelGroup* panel, size_t n, size_t k, ByteTokens x, size_t tokens, bool add, float* y,
              size_t stride) {
  constexpr size_t kMost = 20;
  const size_t groups = k / 32, parts = (groups + kMost - 1) / kMost, part = (groups + parts - 1) / parts * 32;
  for (size_t at = 0; at < k; at += part, panel += part / 32, add = true) {
    const size_t columns = k - at < part ? k - at : part;
    for (size_t first = 0; first < n; first += 2 * kLanes)
      in_groups<4>(tokens, [&]<size_t count>(size_t t) {
        multiply_rows<bits, count>(panel, first, n - first < 2 * kLanes ? n - first : 2 * kLanes, columns, x, t,
                                   add, y + t * stride + first, stride);
      });
    x.q += part;
    x.d += part / 32;
    x.sum += part / 32;
  }
}

void gemm_bytes(const PanelGroup* panel, int bits, size_t n, size_t k, const ByteTokens& x, size_t tokens,
                bool add, float* y, size_t stride) {
  const auto of_bits = bits == 4 ? multiply<4> : bits == 5 ? multiply<5> : bits == 7 ? multiply<7> : multiply<8>;
  of_bits(panel, n, k, x, tokens, add, y, stride);
}

}  // namespace

void add_avx2_bytes(Kernels& table) {
  table.panel_bytes[kQ4_0] = panel_of<Lanes32<Q4_0>>;
  table.panel_bytes[kQ4_1] = panel_of<Lanes32<Q4_1>>;
  table.panel_bytes[kQ5_0] = panel_of<Lanes32<Q5_0>>;
  table.panel_bytes[kQ5_1] = panel_of<Lanes32<Q5_1>>;
  table.panel_bytes[kQ8_0] = panel_of<Signed8_0>;
  table.panel_bytes[kIQ4_NL] = panel_of<LookedUp<IQ4_NL>>;
  table.panel_bytes[kIQ4_XS] = panel_of<LookedUp<IQ4_XS>>;
  table.panel_bytes[kQ4_K] = panel_of<LanesK<Q4_K>>;
  table.panel_bytes[kQ5_K] = panel_of<LanesK<Q5_K>>;
  table.columns_bytes = columns_bytes;
  table.to_bytes = to_bytes;
  table.gemm_bytes = gemm_bytes;
}

}  // namespace fallow

#endif
