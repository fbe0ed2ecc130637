// The products that decode and prefill are made of, one table of functions per instruction set.
// Kernels know nothing of models. The portable table is the oracle of all others.
//
// Weights W (rows, k) lie in memory row by row in a ggml type. Activations meet quantised weights
// as int8 with one scale for 32 values; F32, F16 and BF16 weights meet them as float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace fallow {

// A vector x (k,), k a multiple of 32 for quantised weights. q[i] * d[i / 32] is close to x[i].
struct Activation {
  const float* x;
  const int8_t* q;
  const float* d;      // (k / 32,)
  const float* sum;    // (k / 32,): d times the sum of q
  const float* sum16;  // (k / 16,): d times the sum of q, for formats with groups of 16
};

// y[i] = W[row] . x with row = rows[i], or begin + i where rows is null; i in [0, n).
// `gemv` is this with rows = null, `gemv_rows` with a list.
using GemvRows = void (*)(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                          size_t n, size_t k, const Activation& x, float* y);

// y (k,) += sum over i in [0, n) of coefficient[i] * W[row], rows as above.
using AxpyRows = void (*)(const uint8_t* w, size_t row_bytes, const int32_t* rows, size_t begin,
                          size_t n, size_t k, const float* coefficient, float* y);

// kPanel rows of W, of which the first `n` exist, in a panel for `gemm_int8`:
// q[(c * kPanel + r) * 4 + j] = q of row r at column 4 c + j; s and m (k / group, kPanel), where
// w = s q - m.
using PackInt8 = void (*)(const uint8_t* w, size_t row_bytes, size_t n, size_t k, uint8_t* q,
                          float* s, float* m);

// Rows per panel of the batched products.
constexpr size_t kPanel = 32;

struct Kernels {
  const char* name;  // "portable", "avx2", "avx512", "neon"

  GemvRows gemv_rows[kGgmlTypes];  // null: the type is not supported
  AxpyRows axpy_rows[kGgmlTypes];
  PackInt8 pack_int8[kGgmlTypes];  // null for F32, F16, BF16

  // k floats as float32, of any supported type.
  void (*decode)(uint32_t type, const uint8_t* row, size_t k, float* y);

  // x (k,) -> q, d, sum, sum16 as in Activation; k a multiple of 32.
  void (*quantize)(const float* x, size_t k, int8_t* q, float* d, float* sum, float* sum16);

  // y[t * stride + r] = panel row r . x of token t, r in [0, n), t in [0, tokens); the arrays of
  // x hold all tokens one after another.
  void (*gemm_int8)(const uint8_t* q, const float* s, const float* m, size_t group, size_t n,
                    size_t k, const Activation& x, size_t tokens, float* y, size_t stride);

  // y[t * stride + r] (+)= sum over j of a[j * kPanel + r] * x[t * x_stride + j], r in [0, n).
  void (*gemm_f32)(const float* a, size_t n, size_t k, const float* x, size_t x_stride,
                   size_t tokens, bool add, float* y, size_t stride);

  float (*dot_f32)(const float* a, const float* b, size_t n);
  float (*dot_f16)(const uint16_t* a, const float* b, size_t n);
  void (*axpy_f16)(float c, const uint16_t* a, size_t n, float* y);  // y += c * a
  void (*to_f16)(const float* x, size_t n, uint16_t* y);
  float (*sum_squares)(const float* x, size_t n);
  // In place: x = exp(x - max(x)); returns the sum.
  float (*softmax_numerators)(float* x, size_t n);
  void (*silu)(float* x, size_t n);
  void (*gelu_tanh)(float* x, size_t n);
};

// Weights per scale of a quantised type; 0 for others.
size_t group_size(uint32_t type);

const Kernels& portable_kernels();
// Null where this build or this processor lacks the instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// The fastest table that runs here.
const Kernels& best_kernels();
// By name; null if it does not run here.
const Kernels* find_kernels(const char* name);

}  // namespace fallow
