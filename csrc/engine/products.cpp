#include "engine/products.h"

#include <algorithm>

#include "kernels/digits.h"

namespace fallow {
namespace {

// Rows that sum_rows decodes at once.
constexpr size_t kSummedRows = 128;
// The same in bytes: 16 groups of eight panels are 160 KB of the second cache.
constexpr size_t kSummedBytes = 512;
// Rows that several tokens are multiplied with in turn where no kernel takes them together.
constexpr size_t kSharedRows = 128;

// Bytes [from, from + bytes) of some rows, `step` apart: as they lie or, of tiles, in `plain`.
struct PlainRows {
  const uint8_t* data;
  size_t step;
};
PlainRows plain_rows(const Matrix& w, size_t row, size_t n, size_t from, size_t bytes,
                     std::vector<uint8_t>& plain) {
  const uint8_t* first = w.data + row * w.row_bytes;
  if (w.layout == Layout::kRows) return {first + from, w.row_bytes};
  for (size_t i = 0; i < n; i += kTileRows)
    rows_of_tile(w.layout, w.type, first + i * w.row_bytes, from, bytes, plain.data() + i * bytes);
  return {plain.data(), bytes};
}

// Whose products prefill makes in bytes. Instead of floats also those of q_proj, k_proj and o_proj: with AVX2
// they make prompts of SmolLM2, Gemma-3-270M and Qwen2.5-Coder-1.5B 1.25, 1.18 and 1.21 times as fast, and take
// them from 0.0024, 0.0018 and 0.0006 nats to 0.0029, 0.0020 and 0.0007. Instead of bfloat16, o_proj's alone took
// SmolLM2 from 0.0018 to 0.0026 for no more speed. v_proj is small, and cost SmolLM2 0.0004 nats more with AVX2;
// errors of the head are the logits' own.
bool takes_bytes(Tap input, bool instead_of_floats) {
  return input == kGateInput || input == kUpInput ||
         (instead_of_floats && (input == kQInput || input == kKInput || input == kOInput));
}

}  // namespace

Input::Input(size_t tokens, size_t w, const Kernels& kernels)
    : width(w), x(tokens * w), half(kernels.to_bf16 && !is_decode(tokens) ? tokens * w : 0) {
  const size_t few = std::min(tokens, kFew), some = kernels.to_bytes ? tokens : few;
  d.resize(some * (w / 32));
  sum.resize(some * (w / 32));
  sum16.resize(few * (w / 16));
  high.resize(some * w);
  low.resize(few * w);
  one_digit.resize(few);
}

Activation Input::activation(size_t token) const {
  return {x.data() + token * width,          high.data() + token * width,
          low.data() + token * width,        d.data() + token * (width / 32),
          sum.data() + token * (width / 32), sum16.data() + token * (width / 16),
          token < one_digit.size() && one_digit[token] != 0};
}

Products::Products(Runtime& run, Cuts& cuts, size_t tokens, size_t width, size_t d_ff)
    : run_(run), cuts_(cuts), cut_input_(tokens, width, run.kernels),
      scratch_(run.n_threads()) {
  if (run.kernels.gemm_bf16) x_half_.resize(tokens * d_ff);
  if (run.kernels.gemm_bytes) {
    x_bytes_.resize(tokens * d_ff);
    x_d_.resize(tokens * (d_ff / 32));
    x_sum_.resize(x_d_.size());
  }
  const size_t panel = std::max(width * kPanel, kSummedRows * 256);
  for (Scratch& own : scratch_) {
    own.panel.resize(panel);
    own.rows.resize(std::max(width * kPanel, size_t{32} * 256));
    own.plain.resize(panel + panel / 8);  // Q8_0 takes 34 bytes for 32 weights, other types less
    if (run.kernels.gemm_bf16) own.panel_half.resize(panel);
    if (run.kernels.gemm_bytes) own.panel_bytes.resize(std::max(width, 8 * kSummedBytes) / 32);
  }
}

void Products::prepare(Input& input, size_t n, bool few) const {
  const Kernels& k = run_.kernels;
  const size_t w = input.width;
  input.few = few;
  if (!few) {
    run_.for_tokens(n, [&](size_t t, int) {
      const float* x = input.x.data() + t * w;
      if (k.to_bf16) k.to_bf16(x, w, input.half.data() + t * w);
      if (k.to_bytes && w % 32 == 0)
        k.to_bytes(x, w, input.high.data() + t * w, input.d.data() + t * (w / 32),
                   input.sum.data() + t * (w / 32));
    });
  } else if (w % 32 == 0) {  // otherwise its weights are F32, F16 or BF16
    run_.for_tokens(n, [&](size_t t, int) {
      input.one_digit[t] = quantize_in_digits(
          k, input.x.data() + t * w, w, input.high.data() + t * w, input.low.data() + t * w,
          input.d.data() + t * (w / 32), input.sum.data() + t * (w / 32), input.sum16.data() + t * (w / 16));
    });
  }
}

void Products::multiply(size_t layer, const Input& input, size_t n,
                        std::initializer_list<Product> products) {
  if (std::none_of(products.begin(), products.end(),
                   [&](const Product& p) { return cuts_.any(layer, {p.input}); }))
    return multiply(input, n, products.begin(), products.end());
  cut_input_.width = input.width;
  for (const Product& p : products) {
    run_.for_tokens(n, [&](size_t t, int worker) {
      float* x = cut_input_.x.data() + t * input.width;
      std::copy_n(input.x.data() + t * input.width, input.width, x);
      cuts_.apply(cuts_.at(layer, p.input), x, input.width, worker);
    });
    prepare(cut_input_, n, input.few);
    multiply(cut_input_, n, p);
  }
}

void Products::multiply(const Input& input, size_t n, const Product& product) {
  multiply(input, n, &product, &product + 1);
}

void Products::multiply(const Input& input, size_t n, const Product* begin, const Product* end) {
  run_.pool.run([&](int worker) {
    for (const Product* p = begin; p != end; ++p) {
      if (p->w.rows == 0) continue;  // a matrix that the layer does not have
      if (!input.few) {
        multiply_block(input, n, *p, worker);
        continue;
      }
      const auto [first, last] = share_of_rows(p->w.rows, worker, run_.pool.size());
      float* y = p->y + first;
      gemv(p->w, first, last - first, input, n, y, p->step(), worker);
      if (p->bias)
        for (size_t t = 0; t < n; ++t) add_to(y + t * p->step(), p->bias + first, last - first);
    }
  });
}

// Whether prefill multiplies this matrix in bfloat16; `k` is the width of its panels.
bool Products::uses_bf16(const Matrix& w, size_t k) const {
  return run_.kernels.gemm_bf16 && w.type != kF32 && w.type != kF16 && k % 2 == 0;
}

// Whether sum_rows does so in bytes: of quantised weights, in whole groups.
bool Products::sums_bytes(const Matrix& w) const {
  return in_bytes_ && run_.kernels.panel_bytes[w.type] && w.rows % 32 == 0;
}

// One thread's panels of y (T, rows) = x W^T + bias.
void Products::multiply_block(const Input& input, size_t n, const Product& p, int worker) {
  const Share share = share_of(pieces(p.w.rows, kPanel), worker, run_.pool.size());
  const bool in_bytes = in_bytes_ && takes_bytes(p.input, !run_.kernels.gemm_bf16);
  for (size_t panel = share.begin; panel < share.end; ++panel) {
    const size_t row = panel * kPanel, rows = std::min<size_t>(kPanel, p.w.rows - row);
    float* y = p.y + row;
    multiply_panel(input, n, p.w, row, rows, y, p.step(), worker, in_bytes);
    if (p.bias)
      for (size_t t = 0; t < n; ++t) add_to(y + t * p.step(), p.bias + row, rows);
  }
}

void Products::multiply_panel(const Input& input, size_t n, const Matrix& w, size_t row,
                              size_t rows, float* y, size_t stride, int worker, bool in_bytes) {
  const Kernels& kernels = run_.kernels;
  Scratch& own = scratch_[static_cast<size_t>(worker)];
  const size_t k = w.cols;
  if (const auto make = kernels.panel_bytes[w.type]; make && in_bytes) {
    PanelGroup* panel = own.panel_bytes.data();
    const int bits = make(w.data + row * w.row_bytes, w.row_bytes, w.layout != Layout::kRows, rows, k, panel);
    return kernels.gemm_bytes(panel, bits, rows, k, input.bytes(), n, false, y, stride);
  }
  const PlainRows plain = plain_rows(w, row, rows, 0, w.row_bytes, own.plain);
  for (size_t r = 0; r < rows; ++r)
    kernels.decode(w.type, plain.data + r * plain.step, k, own.rows.data() + r * k);
  if (uses_bf16(w, k)) {
    kernels.panel_bf16(own.rows.data(), rows, k, own.panel_half.data());
    kernels.gemm_bf16(own.panel_half.data(), rows, k, input.half.data(), input.width, n, false, y,
                      stride);
  } else {
    kernels.panel_f32(own.rows.data(), rows, k, own.panel.data());
    kernels.gemm_f32(own.panel.data(), rows, k, input.x.data(), input.width, n, false, y, stride);
  }
}

// Every thread takes some columns, decodes them for a few rows at a time, and adds their part for all
// tokens.
void Products::sum_rows(const Matrix& w, size_t n, const float* x, float* y) {
  const Kernels& kernels = run_.kernels;
  if (sums_bytes(w)) return sum_rows_bytes(w, n, x, y);
  const size_t unit = w.cols % 256 == 0 ? 256 : 32;  // columns; whole blocks of any format
  const bool half = uses_bf16(w, w.rows);
  if (half)
    run_.for_tokens(n, [&](size_t t, int) {
      kernels.to_bf16(x + t * w.rows, w.rows, x_half_.data() + t * w.rows);
    });
  run_.pool.run([&](int worker) {
    Scratch& own = scratch_[static_cast<size_t>(worker)];
    float *first = own.rows.data(), *second = first + 256, *panel = own.panel.data();
    uint16_t* panel_half = own.panel_half.data();
    const Share share = share_of(pieces(w.cols, unit), worker, run_.pool.size());
    for (size_t u = share.begin; u < share.end; ++u) {
      const size_t column = u * unit, width = std::min<size_t>(unit, w.cols - column);
      // The panel of columns [c, c + kPanel) starts at c * kSummedRows.
      for (size_t row = 0; row < w.rows; row += kSummedRows) {
        const size_t rows = std::min<size_t>(kSummedRows, w.rows - row);
        const PlainRows plain = plain_rows(w, row, rows, w.row_bytes * column / w.cols,
                                           w.row_bytes * width / w.cols, own.plain);
        for (size_t r = 0; r < rows; r += half ? 2 : 1) {
          const uint8_t* part = plain.data + r * plain.step;
          kernels.decode(w.type, part, width, first);
          if (half) kernels.decode(w.type, part + plain.step, width, second);
          for (size_t c = 0; c < width; c += kPanel) {
            const size_t there = std::min(kPanel, width - c), to = c * kSummedRows + r * kPanel;
            if (half) {
              kernels.pair_bf16(first + c, second + c, there, panel_half + to);
            } else {
              std::copy_n(first + c, there, panel + to);
            }
          }
        }
        for (size_t c = 0; c < width; c += kPanel) {
          const size_t there = std::min(kPanel, width - c);
          if (half) {
            kernels.gemm_bf16(panel_half + c * kSummedRows, there, rows, x_half_.data() + row,
                              w.rows, n, row > 0, y + column + c, w.cols);
          } else {
            kernels.gemm_f32(panel + c * kSummedRows, there, rows, x + row, w.rows, n, row > 0,
                             y + column + c, w.cols);
          }
        }
      }
    }
  });
}

// The same in bytes, 32 rows to a group.
void Products::sum_rows_bytes(const Matrix& w, size_t n, const float* x, float* y) {
  const Kernels& kernels = run_.kernels;
  const size_t k = w.rows, unit = w.cols % 256 == 0 ? 256 : 32;  // columns; whole blocks of any format
  run_.for_tokens(n, [&](size_t t, int) {
    kernels.to_bytes(x + t * k, k, x_bytes_.data() + t * k, x_d_.data() + t * (k / 32),
                     x_sum_.data() + t * (k / 32));
  });
  run_.pool.run([&](int worker) {
    Scratch& own = scratch_[static_cast<size_t>(worker)];
    const Share share = share_of(pieces(w.cols, unit), worker, run_.pool.size());
    const size_t end = share.end * unit;
    for (size_t column = share.begin * unit, width; column < end; column += width) {
      width = std::min<size_t>(256, end - column);
      for (size_t row = 0; row < k; row += kSummedBytes) {
        const size_t rows = std::min(kSummedBytes, k - row), groups = rows / 32;
        int bits = 0;
        for (size_t g = 0; g < groups; ++g) {
          const PlainRows plain = plain_rows(w, row + 32 * g, 32, w.row_bytes * column / w.cols,
                                             w.row_bytes * width / w.cols, own.plain);
          for (size_t r = 0; r < 32; ++r)
            kernels.decode(w.type, plain.data + r * plain.step, width, own.rows.data() + r * width);
          for (size_t c = 0; c < width; c += kPanel)
            bits = kernels.columns_bytes(own.rows.data() + c, width, std::min(kPanel, width - c),
                                         own.panel_bytes[c / kPanel * groups + g]);
        }
        const ByteTokens tokens{x_bytes_.data() + row, x_d_.data() + row / 32, x_sum_.data() + row / 32, k};
        for (size_t c = 0; c < width; c += kPanel)
          kernels.gemm_bytes(&own.panel_bytes[c / kPanel * groups], bits, std::min(kPanel, width - c), rows,
                             tokens, n, row > 0, y + column + c, w.cols);
      }
    }
  });
}

void Products::gemv(const Matrix& w, const int32_t* rows, size_t begin, size_t n,
                    const Activation& x, float* y, int worker) {
  run_.kernels.gemv_rows[w.type](w.data, w.row_bytes, rows, begin, n, w.cols, x, y);
  run_.statistics.read(worker, n * w.row_bytes);
}

void Products::gemv(const Matrix& w, size_t begin, size_t n, const Input& input, size_t tokens,
                    float* y, size_t stride, int worker) {
  Activation x[kFew];
  for (size_t t = 0; t < tokens; ++t) x[t] = input.activation(t);
  gemv(w, begin, n, x, tokens, y, stride, worker);
}

void Products::gemv(const Matrix& w, size_t begin, size_t n, const Activation* x, size_t tokens,
                    float* y, size_t stride, int worker) {
  if (tokens == 1 && w.layout == Layout::kRows) return gemv(w, nullptr, begin, n, x[0], y, worker);
  run_.statistics.read(worker, n * w.row_bytes);
  const auto& table = w.layout == Layout::kRows ? run_.kernels.gemv_tokens : run_.kernels.gemv_tiles;
  if (const GemvTokens together = table[w.type])
    return together(w.data, w.row_bytes, begin, n, w.cols, x, tokens, y, stride);
  for (size_t i = 0; i < n; i += kSharedRows)
    for (size_t t = 0; t < tokens; ++t)
      run_.kernels.gemv_rows[w.type](w.data, w.row_bytes, nullptr, begin + i,
                                     std::min(kSharedRows, n - i), w.cols, x[t], y + t * stride + i);
}

void Products::axpy(const Matrix& w, const int32_t* rows, size_t begin, size_t n,
                    const float* coefficient, float* y, int worker) {
  run_.kernels.axpy_rows[w.type](w.data, w.row_bytes, rows, begin, n, w.cols, coefficient, y);
  run_.statistics.read(worker, n * w.row_bytes);
}

void Products::axpy(const Matrix& w, size_t begin, size_t n, const float* coefficient, size_t from,
                    size_t tokens, float* y, size_t stride, int worker) {
  if (tokens == 1 && w.layout == Layout::kRows) return axpy(w, nullptr, begin, n, coefficient, y, worker);
  run_.statistics.read(worker, n * w.row_bytes);
  const auto& table = w.layout == Layout::kRows ? run_.kernels.axpy_tokens : run_.kernels.axpy_tiles;
  if (const AxpyTokens together = table[w.type])
    return together(w.data, w.row_bytes, begin, n, w.cols, coefficient, from, tokens, y, stride);
  for (size_t t = 0; t < tokens; ++t)
    run_.kernels.axpy_rows[w.type](w.data, w.row_bytes, nullptr, begin, n, w.cols,
                                   coefficient + t * from, y + t * stride);
}

}  // namespace fallow
