// The kernels for their tests, as the module fallow._kernel_tests; built with -DFALLOW_TESTS=ON.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "engine/tiles.h"

using namespace nb::literals;
using namespace fallow;

namespace {

// A matrix of rows of k weights and one activation vector for it: what the
// tests of the kernels call. Sizes are checked here, so that a wrong test cannot crash.
struct KernelTest {
  const Kernels& kernels;
  const BlockFormat& format;
  Bytes weights;
  size_t k, row_bytes, rows;

  KernelTest(const std::string& table, const std::string& type, Bytes w, size_t width)
      : kernels(kernels_of(table)), format(format_of(type)), weights(w), k(width) {
    if (!kernels.gemv_rows[format.type]) throw nb::value_error("no kernel for this type");
    if (k == 0 || k % format.block_size != 0) throw nb::value_error("width is not whole blocks");
    row_bytes = k / format.block_size * format.block_bytes;
    if (format.type == kTwoBits) row_bytes = two_bits_bytes(k);
    if (w.size() % row_bytes != 0) throw nb::value_error("weights are not whole rows");
    rows = w.size() / row_bytes;
  }

  void check(const std::optional<Indices>& list) const {
    if (!list) return;
    for (size_t i = 0; i < list->size(); ++i)
      if (list->data()[i] < 0 || static_cast<size_t>(list->data()[i]) >= rows)
        throw nb::value_error("a row is outside the matrix");
  }

  size_t count(const std::optional<Indices>& list) const { return list ? list->size() : rows; }
};

// x in one digit where that is enough; kernels that are not told multiply by a lower one of 0.
Quantized in_digits(const Kernels& kernels, const float* x, size_t n, bool may_be_one, bool told) {
  Quantized found(kernels, x, n, may_be_one);
  found.one_digit = found.one_digit && told;
  return found;
}

void gemv_rows(const std::string& table, const std::string& type, Bytes w, ConstFloats x,
               std::optional<Indices> list, Floats y, bool may_be_one, bool told) {
  const KernelTest t(table, type, w, x.size());
  t.check(list);
  if (y.size() != t.count(list)) throw nb::value_error("y has the wrong size");
  const Quantized quantized = in_digits(t.kernels, x.data(), x.size(), may_be_one, told);
  t.kernels.gemv_rows[t.format.type](w.data(), t.row_bytes, list ? list->data() : nullptr, 0,
                                     t.count(list), t.k, quantized.with(x.data()), y.data());
}

void axpy_rows(const std::string& table, const std::string& type, Bytes w,
                    ConstFloats coefficient, std::optional<Indices> list, Floats y) {
  const KernelTest t(table, type, w, y.size());
  t.check(list);
  if (coefficient.size() != t.count(list)) throw nb::value_error("one coefficient per row");
  if (!t.kernels.axpy_rows[t.format.type]) throw nb::value_error("no sums of rows of this type");
  t.kernels.axpy_rows[t.format.type](w.data(), t.row_bytes, list ? list->data() : nullptr, 0,
                                     t.count(list), t.k, coefficient.data(), y.data());
}

// Products of several tokens with rows of a width, and with tiles of them: those that a table has.
std::vector<std::string> products(const std::string& table, const std::string& type, size_t width) {
  const Kernels& kernels = kernels_of(table);
  const BlockFormat& format = format_of(type);
  const size_t row_bytes = width / format.block_size * format.block_bytes;
  std::vector<std::string> found;
  if (kernels.gemv_tokens[format.type]) found.push_back("gemv of rows");
  if (kernels.axpy_tokens[format.type]) found.push_back("axpy of rows");
  const auto tiled = [&](Layout layout) {
    return has_tiles(kernels, layout, format.type, kTileRows, row_bytes);
  };
  if (tiled(Layout::kDwordTiles)) found.push_back("gemv of tiles");
  if (tiled(Layout::kByteTiles)) found.push_back("axpy of tiles");
  return found;
}

// A test's matrix, and a copy of it in tiles if asked for.
struct InLayout : KernelTest {
  std::vector<uint8_t> tiles;

  InLayout(const std::string& table, const std::string& type, Bytes w, size_t width, bool tiled, Layout layout)
      : KernelTest(table, type, w, width) {
    if (!tiled) return;
    if (!has_tiles(kernels, layout, format.type, rows, row_bytes)) throw nb::value_error("no tiles");
    tiles.assign(w.data(), w.data() + w.size());
    to_tiles(layout, format.type, tiles.data(), rows, row_bytes);
    std::vector<uint8_t> back = tiles;
    to_rows(layout, format.type, back.data(), rows, row_bytes);
    if (!std::equal(back.begin(), back.end(), w.data())) throw nb::value_error("rows do not come back");
  }
  const uint8_t* data() const { return tiles.empty() ? weights.data() : tiles.data(); }
};

// y (T, rows) for x (T, k)
void gemv_tokens(const std::string& table, const std::string& type, Bytes w, Rows x, bool tiled,
                 WritableRows y, bool may_be_one, bool told) {
  const InLayout t(table, type, w, x.shape(1), tiled, Layout::kDwordTiles);
  const GemvTokens product = (tiled ? t.kernels.gemv_tiles : t.kernels.gemv_tokens)[t.format.type];
  if (!product || y.shape(0) != x.shape(0) || y.shape(1) != t.rows) throw nb::value_error("no such product");
  std::vector<Quantized> quantized;
  std::vector<Activation> tokens;
  quantized.reserve(x.shape(0));
  for (size_t i = 0; i < x.shape(0); ++i) {
    quantized.push_back(in_digits(t.kernels, x.data() + i * t.k, t.k, may_be_one, told));
    tokens.push_back(quantized.back().with(x.data() + i * t.k));
  }
  for (size_t i = 0, n; i < t.rows; i += n) {  // in two parts
    n = i == 0 && t.rows > kTileRows ? kTileRows : t.rows - i;
    product(t.data(), t.row_bytes, i, n, t.k, tokens.data(), tokens.size(), y.data() + i, t.rows);
  }
}

// y (T, k) += for coefficients (T, rows)
void axpy_tokens(const std::string& table, const std::string& type, Bytes w, Rows coefficient, bool tiled,
                 WritableRows y) {
  const InLayout t(table, type, w, y.shape(1), tiled, Layout::kByteTiles);
  const AxpyTokens sum = (tiled ? t.kernels.axpy_tiles : t.kernels.axpy_tokens)[t.format.type];
  if (!sum || y.shape(0) != coefficient.shape(0) || coefficient.shape(1) != t.rows)
    throw nb::value_error("no such sum");
  sum(t.data(), t.row_bytes, 0, t.rows, t.k, coefficient.data(), t.rows, y.shape(0), y.data(), t.k);
}

void decode(const std::string& table, const std::string& type, Bytes w, Floats y) {
  const KernelTest t(table, type, w, y.size());
  if (t.rows != 1) throw nb::value_error("decode takes one row");
  t.kernels.decode(t.format.type, w.data(), t.k, y.data());
}

// Tokens (T, k), rounded to bytes.
struct Rounded {
  std::vector<int8_t> q;
  std::vector<float> d, sum;
  size_t stride;

  Rounded(const Kernels& kernels, const Rows& x)
      : q(x.size()), d(x.size() / 32), sum(d.size()), stride(x.shape(1)) {
    if (!kernels.gemm_bytes || stride % 32 != 0) throw nb::value_error("no products in bytes");
    kernels.to_bytes(x.data(), x.size(), q.data(), d.data(), sum.data());
  }
  ByteTokens tokens() const { return {q.data(), d.data(), sum.data(), stride}; }
};

// y (T, rows) for x (T, k), through the panels of prefill: of "floats", "bfloat16", "bytes" or "bytes
// of tiles"; or through those of the cache: "halves".
void gemm(const std::string& table, const std::string& type, Bytes w, Rows x, WritableRows y,
          const std::string& panels) {
  const KernelTest t(table, type, w, x.shape(1));
  if (y.shape(0) != x.shape(0) || y.shape(1) != t.rows) throw nb::value_error("y: wrong shape");
  const size_t tokens = x.shape(0);
  std::vector<float> rows(t.k * kPanel), panel(t.k * kPanel);
  for (size_t first = 0; first < t.rows; first += kPanel) {
    const size_t n = std::min(kPanel, t.rows - first);
    const uint8_t* data = w.data() + first * t.row_bytes;
    for (size_t r = 0; r < n; ++r)
      t.kernels.decode(t.format.type, data + r * t.row_bytes, t.k, &rows[r * t.k]);
    float* to = y.data() + first;
    if (panels == "bytes" || panels == "bytes of tiles") {
      const bool tiled = panels != "bytes";
      const InLayout matrix(table, type, w, t.k, tiled, Layout::kDwordTiles);
      const Rounded rounded(t.kernels, x);
      std::vector<PanelGroup> groups(t.k / 32);
      if (!t.kernels.panel_bytes[t.format.type]) throw nb::value_error("no panels of this type");
      const int bits = t.kernels.panel_bytes[t.format.type](matrix.data() + first * t.row_bytes, t.row_bytes, tiled, n, t.k,
                                           groups.data());
      t.kernels.gemm_bytes(groups.data(), bits, n, t.k, rounded.tokens(), tokens, false, to, t.rows);
    } else if (panels == "bfloat16") {
      if (!t.kernels.gemm_bf16 || t.k % 2 != 0) throw nb::value_error("no bfloat16 product");
      std::vector<uint16_t> panel_half(t.k * kPanel), x_half(x.size());
      t.kernels.panel_bf16(rows.data(), n, t.k, panel_half.data());
      t.kernels.to_bf16(x.data(), x.size(), x_half.data());
      t.kernels.gemm_bf16(panel_half.data(), n, t.k, x_half.data(), t.k, tokens, false, to, t.rows);
    } else if (panels == "halves") {
      if (!t.kernels.gemm_f16) throw nb::value_error("no product of halves");
      std::vector<uint16_t> panel_half(panel.size());
      t.kernels.panel_f32(rows.data(), n, t.k, panel.data());
      t.kernels.to_f16(panel.data(), panel.size(), panel_half.data());
      t.kernels.gemm_f16(panel_half.data(), n, t.k, x.data(), t.k, tokens, false, to, t.rows);
    } else {
      t.kernels.panel_f32(rows.data(), n, t.k, panel.data());
      t.kernels.gemm_f32(panel.data(), n, t.k, x.data(), t.k, tokens, false, to, t.rows);
    }
  }
}

// y (T, columns) += x (T, rows) W in bytes, of floats W (rows, columns).
void sum_rows_bytes(const std::string& table, Rows w, Rows x, WritableRows y) {
  const Kernels& kernels = kernels_of(table);
  const Rounded rounded(kernels, x);
  const size_t k = w.shape(0), columns = w.shape(1);
  if (x.shape(1) != k || y.shape(0) != x.shape(0) || y.shape(1) != columns)
    throw nb::value_error("wrong shapes");
  for (size_t c = 0; c < columns; c += kPanel) {
    std::vector<PanelGroup> groups(k / 32);
    const size_t n = std::min(kPanel, columns - c);
    int bits = 0;
    for (size_t g = 0; g < k / 32; ++g)
      bits = kernels.columns_bytes(w.data() + 32 * g * columns + c, columns, n, groups[g]);
    kernels.gemm_bytes(groups.data(), bits, n, k, rounded.tokens(), x.shape(0), true, y.data() + c, columns);
  }
}

void activation(const std::string& table, const std::string& name, Floats x) {
  const Kernels& kernels = kernels_of(table);
  if (name == "silu") return kernels.silu(x.data(), x.size());
  if (name == "gelu_tanh") return kernels.gelu_tanh(x.data(), x.size());
  if (name == "softmax" && x.size() > 0) {
    const float most = *std::max_element(x.data(), x.data() + x.size());
    float largest;
    const float sum = kernels.softmax_numerators(x.data(), x.size(), largest);
    if (largest != most) throw nb::value_error("not the largest");
    for (size_t i = 0; i < x.size(); ++i) x.data()[i] /= sum;
    return;
  }
  throw nb::value_error("unknown function");
}

std::vector<int32_t> list_nonzero(const std::string& table, ConstFloats x, size_t begin) {
  std::vector<int32_t> list(x.size() - begin);
  list.resize(kernels_of(table).list_nonzero(x.data(), begin, x.size(), list.data()));
  return list;
}

}  // namespace

NB_MODULE(_kernel_tests, m) {
  m.def("gemv_rows", &gemv_rows, "kernels"_a, "type"_a, "weights"_a, "x"_a,
        "rows"_a.none(), "y"_a, "may_be_one"_a = false, "told"_a = true);
  m.def("has_one_digit", [](const std::string& table, ConstFloats x) {
    return Quantized(kernels_of(table), x.data(), x.size(), true).one_digit;
  }, "kernels"_a, "x"_a);
  m.def("axpy_rows", &axpy_rows, "kernels"_a, "type"_a, "weights"_a, "coefficient"_a,
        "rows"_a.none(), "y"_a);
  m.def("products", &products, "kernels"_a, "type"_a, "width"_a);
  m.def("gemv_tokens", &gemv_tokens, "kernels"_a, "type"_a, "weights"_a, "x"_a, "tiled"_a, "y"_a,
        "may_be_one"_a = false, "told"_a = true);
  m.def("axpy_tokens", &axpy_tokens, "kernels"_a, "type"_a, "weights"_a, "coefficient"_a, "tiled"_a, "y"_a);
  m.def("decode", &decode, "kernels"_a, "type"_a, "weights"_a, "y"_a);
  m.def("gemm", &gemm, "kernels"_a, "type"_a, "weights"_a, "x"_a, "y"_a, "panels"_a);
  m.def("sum_rows_bytes", &sum_rows_bytes, "kernels"_a, "weights"_a, "x"_a, "y"_a);
  m.def("activation", &activation, "kernels"_a, "name"_a, "x"_a);
  m.def("topk_threshold", [](const std::string& table, ConstFloats x, size_t k) {
    return kernels_of(table).topk_threshold(x.data(), x.size(), k);
  }, "kernels"_a, "magnitudes"_a, "k"_a);
  m.def("list_nonzero", &list_nonzero, "kernels"_a, "values"_a, "begin"_a);
}
