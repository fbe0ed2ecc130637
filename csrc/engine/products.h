// Products of tokens with weights, in the two ways that the engine multiplies: decode reads every row
// once for at most kFew tokens, prefill unpacks rows into panels for a block of them.
#pragma once

#include <initializer_list>
#include <vector>

#include "engine/cuts.h"
#include "engine/packed.h"
#include "engine/runtime.h"

namespace fallow {

// Tokens on their way into a product, (T, width): floats; for at most kFew tokens integers; for a block
// of prefill bfloat16 and bytes, which are `high`, where the kernels have such products.
struct Input {
  size_t width = 0;
  bool few = true;  // whether their products are those of decode
  std::vector<float> x, d, sum, sum16;
  std::vector<int8_t> high, low;
  std::vector<char> one_digit;  // (few tokens,)
  std::vector<uint16_t> half;

  Input(size_t tokens, size_t width, const Kernels& kernels);
  Activation activation(size_t token = 0) const;
  ByteTokens bytes() const { return {high.data(), d.data(), sum.data(), width}; }
};

// y (T, rows) = x W^T + bias, of inputs that a plan may cut at `input`.
struct Product {
  const Matrix& w;
  const float* bias;
  float* y;
  Tap input;
  size_t stride = 0;  // from token to token; 0: rows

  size_t step() const { return stride > 0 ? stride : w.rows; }
};

class Products {
 public:
  // `tokens` of a block, inputs of at most `width` values, rows of W^T (d_ff, hidden) for sum_rows.
  Products(Runtime& run, Cuts& cuts, size_t tokens, size_t width, size_t d_ff);

  // Whether a block's products may be those in bytes, which are faster and less exact
  // (docs/results/engine.md).
  void allow_bytes(bool allow) { in_bytes_ = allow; }
  // Makes from the floats of an input what its products need besides. Those of a block, however few they
  // are, have products that do not depend on how many tokens there are, unless they are to be `few`.
  void prepare(Input& input, size_t n) const { prepare(input, n, is_decode(n)); }
  void prepare(Input& input, size_t n, bool few) const;
  // All products of one input at once, or, where the plan cuts their inputs, one after another.
  void multiply(size_t layer, const Input& input, size_t n, std::initializer_list<Product> products);
  void multiply(const Input& input, size_t n, const Product& product);

  // y[t * stride + r] = W[row + r] . x_t for a block of tokens and some rows, at most kPanel.
  void multiply_panel(const Input& input, size_t n, const Matrix& w, size_t row, size_t rows,
                      float* y, size_t stride, int worker, bool in_bytes = false);
  // y (T, cols) = x (T, rows) W for a block of tokens.
  void sum_rows(const Matrix& w, size_t n, const float* x, float* y);

  // What one thread does for decode, counting the bytes that it reads. Rows are `rows`, ascending, or
  // begin and following where rows is null.
  // y[i] = W[row i] . x
  void gemv(const Matrix& w, const int32_t* rows, size_t begin, size_t n, const Activation& x,
            float* y, int worker);
  // y[t * stride + i] = W[begin + i] . x_t
  void gemv(const Matrix& w, size_t begin, size_t n, const Input& input, size_t tokens, float* y,
            size_t stride, int worker);
  void gemv(const Matrix& w, size_t begin, size_t n, const Activation* x, size_t tokens, float* y,
            size_t stride, int worker);
  // y (cols,) += sum over i of coefficient[i] * W[row i]
  void axpy(const Matrix& w, const int32_t* rows, size_t begin, size_t n, const float* coefficient,
            float* y, int worker);
  // y[t * stride + j] += sum over i of coefficient[t * from + i] * W[begin + i][j]
  void axpy(const Matrix& w, size_t begin, size_t n, const float* coefficient, size_t from,
            size_t tokens, float* y, size_t stride, int worker);

 private:
  struct Scratch {
    std::vector<float> rows, panel;
    std::vector<uint16_t> panel_half;
    std::vector<uint8_t> plain;  // rows that lie in tiles
    std::vector<PanelGroup> panel_bytes;
  };

  void multiply(const Input& input, size_t n, const Product* begin, const Product* end);
  void multiply_block(const Input& input, size_t n, const Product& product, int worker);
  bool uses_bf16(const Matrix& w, size_t k) const;
  bool sums_bytes(const Matrix& w) const;
  void sum_rows_bytes(const Matrix& w, size_t n, const float* x, float* y);

  Runtime& run_;
  Cuts& cuts_;
  Input cut_input_;
  // (block, d_ff), of sum_rows
  std::vector<uint16_t> x_half_;
  std::vector<int8_t> x_bytes_;
  std::vector<float> x_d_, x_sum_;  // (block, d_ff / 32)
  std::vector<Scratch> scratch_;  // of each thread
  bool in_bytes_ = true;
};

}  // namespace fallow
