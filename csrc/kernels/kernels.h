// The products that decode and prefill are made of, one table of functions per instruction set.
// Kernels know nothing of models. The portable table is the oracle of all others.
//
// Weights W (rows, k) lie in memory row by row in a ggml type. Decode reads every weight once for
// one vector and is bound by memory, so quantised weights meet that vector as 16-bit integers, in
// two planes of 8 bits that byte products can take; where the upper one alone says enough of the vector
// (engine/products.cpp), the lower one is 0 and left out. With 8 bits always, as in llama.cpp, SmolLM2 is
// 0.0042 nats from its float32 self. Prefill unpacks weights into panels of floats, bfloat16 or bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/formats.h"
#include "formats/two_bits.h"

namespace fallow {

// A vector x (k,), k a multiple of 32 for quantised weights: x[i] is close to
// d[i / 32] * (256 * high[i] + low[i]).
struct Activation {
  const float* x;
  const int8_t *high, *low;
  const float* d;      // (k / 32,)
  const float* sum;    // (k / 32,): sum of the right side above
  const float* sum16;  // (k / 16,): the same for formats with groups of 16
  bool one_digit = false;  // low is 0; products are the same to the bit without it
};

// y[i] = W[row] . x with row = rows[i], or begin + i where rows is null; i in [0, n).
// `gemv` is this with rows = null, `gemv_rows` with a list.
using GemvRows = void (*)(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                          size_t n, size_t k, const Activation& x, float* y);

// y (k,) += sum over i in [0, n) of coefficient[i] * W[row], rows as above.
using AxpyRows = void (*)(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                          size_t n, size_t k, const float* coefficient, float* y);

// The same two, of rows [begin, begin + n), for several tokens: x[t] gives y[t * stride + i], and
// coefficient[t * from + i] adds to y[t * stride + j]. Bit by bit what one token at a time gives,
// with rows unpacked once for up to kTokens of them.
constexpr size_t kTokens = 4;
using GemvTokens = void (*)(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                            const Activation* x, size_t tokens, float* y, size_t stride);
using AxpyTokens = void (*)(const uint8_t* w, size_t row_bytes, size_t begin, size_t n, size_t k,
                            const float* coefficient, size_t from, size_t tokens, float* y,
                            size_t stride);

// Rows that lie together in a matrix that is laid out in tiles: see engine/tiles.h.
constexpr size_t kTileRows = 16;

// Rows per panel of the batched products.
constexpr size_t kPanel = 32;

// 32 columns of kPanel rows: weight (r, j) is scale[r] * q[j / 4][4 * r + j % 4] - minimum[r].
struct PanelGroup {
  alignas(64) uint8_t q[8][4 * kPanel];
  float scale[kPanel], minimum[kPanel];
};

// A block of tokens x (T, k), each `stride` values long and rounded in groups of 32: x[j] is close to
// d[j / 32] * q[j], and sum[j / 32] is the sum of the right side.
struct ByteTokens {
  const int8_t* q;
  const float *d, *sum;  // stride / 32 apart
  size_t stride;
};

// Rows on either side of a tile of bit counts.
constexpr size_t kBitTile = 4;

struct Kernels {
  const char* name;  // "portable", "avx2", "avx512", "avx512_bf16", "neon", "neon_dotprod"

  GemvRows gemv_rows[kTypes];  // null: the type is not supported
  AxpyRows axpy_rows[kTypes];
  GemvTokens gemv_tokens[kTypes];  // null: there are only those for one token
  AxpyTokens axpy_tokens[kTypes];
  // The same of matrices in tiles, of dwords for gemv and of bytes for axpy, to the bit as of rows;
  // `begin` and n are multiples of kTileRows. Null: matrices of this type stay rows.
  GemvTokens gemv_tiles[kTypes];
  AxpyTokens axpy_tiles[kTypes];

  // k floats as float32, of any supported type.
  void (*decode)(uint32_t type, const uint8_t* row, size_t k, float* y);

  // x (k,) -> the other members of Activation; k a multiple of 32.
  void (*quantize)(const float* x, size_t k, int8_t* high, int8_t* low, float* d, float* sum,
                   float* sum16);

  // Panels hold kPanel rows of a matrix side by side: panel[j * kPanel + r] = rows[r * k + j]. Of
  // the rows the first n exist.
  void (*panel_f32)(const float* rows, size_t n, size_t k, float* panel);
  // y[t * stride + r] (+)= sum over j of panel[j * kPanel + r] * x[t * x_stride + j], r in [0, n).
  void (*gemm_f32)(const float* panel, size_t n, size_t k, const float* x, size_t x_stride,
                   size_t tokens, bool add, float* y, size_t stride);
  // The same of a panel in half precision, to the bit, for a few tokens. Null: it is decoded first.
  void (*gemm_f16)(const uint16_t* panel, size_t n, size_t k, const float* x, size_t x_stride,
                   size_t tokens, bool add, float* y, size_t stride);

  // The same in bfloat16, where columns come in pairs: panel[(j / 2 * kPanel + r) * 2 + j % 2]; k
  // is even. Null where the processor has no such product.
  void (*panel_bf16)(const float* rows, size_t n, size_t k, uint16_t* panel);
  // One pair of columns: first[r] and second[r] for r in [0, n).
  void (*pair_bf16)(const float* first, const float* second, size_t n, uint16_t* panel);
  void (*to_bf16)(const float* x, size_t n, uint16_t* y);
  void (*gemm_bf16)(const uint16_t* panel, size_t n, size_t k, const uint16_t* x, size_t x_stride,
                    size_t tokens, bool add, float* y, size_t stride);

  // The same in bytes: n rows of a type, or as many in tiles of dwords, as k / 32 groups; returns how many
  // bits their weights have. Null where that is not faster.
  int (*panel_bytes[kTypes])(const uint8_t* w, size_t row_bytes, bool tiled, size_t n, size_t k,
                              PanelGroup* panel);
  // One group of n rows of W^T, from 32 rows of W, decoded, that are `stride` apart; returns bits.
  int (*columns_bytes)(const float* rows, size_t stride, size_t n, PanelGroup& panel);
  void (*to_bytes)(const float* x, size_t k, int8_t* q, float* d, float* sum);
  void (*gemm_bytes)(const PanelGroup* panel, int bits, size_t n, size_t k, const ByteTokens& x, size_t tokens,
                     bool add, float* y, size_t stride);

  void (*to_f16)(const float* x, size_t n, uint16_t* y);
  float (*sum_squares)(const float* x, size_t n);
  // In place: x = exp(x - largest), where that is the largest of x, or minus infinity if n is 0; returns
  // the sum.
  float (*softmax_numerators)(float* x, size_t n, float& largest);
  // The threshold that leaves the k largest of n magnitudes above it: the (n - k)-th smallest, 0 if
  // k >= n.
  float (*topk_threshold)(const float* magnitudes, size_t n, size_t k);
  // Lists the indices in [begin, end) of values that are not zero, ascending; returns how many.
  size_t (*list_nonzero)(const float* values, size_t begin, size_t end, int32_t* list);
  // counts[r * kBitTile + c] = bits that are set in both rows[r] and others[c], each of `words` words, a
  // multiple of 8.
  void (*and_tile)(const uint64_t* const* rows, const uint64_t* const* others, size_t words,
                   uint32_t* counts);
  void (*silu)(float* x, size_t n);
  void (*gelu_tanh)(float* x, size_t n);
};

const Kernels& portable_kernels();
// Null where this build or this processor lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dotprod_kernels();

// The tables that run here, the fastest first and the portable one last.
const std::vector<const Kernels*>& usable_kernels();
// By name; null if it does not run here.
const Kernels* find_kernels(const char* name);

}  // namespace fallow
