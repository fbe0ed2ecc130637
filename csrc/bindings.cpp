// Everything that Python sees of the core. Types, shapes and contiguity are checked by the argument
// types; arrays are passed without copies and the GIL is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <tuple>

#include "bits.h"
#include "dequant.h"
#include "engine.h"
#include "gguf.h"
#include "histogram.h"
#include "kernels.h"
#include "mapping.h"
#include "packed.h"
#include "quantize.h"
#include "select.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fallow;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstIndices = Indices;
using BitArray = nb::ndarray<const uint64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableIndices = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CountRows = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::dict gguf_header(Bytes data) {
  GgufHeader header;
  {
    nb::gil_scoped_release release;
    header = parse_gguf(data.data(), data.size());
  }
  nb::dict fields;
  for (auto& field : header.fields)
    fields[nb::cast(field.name)] = field.is_array ? nb::cast(std::move(field.values))
                                                : nb::cast(std::move(field.values[0]));
  nb::list tensors;
  for (const auto& tensor : header.tensors)
    tensors.append(nb::make_tuple(tensor.name, tensor.shape, find_format(tensor.type)->name,
                                  tensor.offset, tensor.n_bytes));
  nb::dict result;
  result["fields"] = fields;
  result["tensors"] = tensors;
  return result;
}

void dequantize_array(const std::string& type, Bytes src, Floats dst, int n_threads) {
  for (const auto& format : all_formats()) {
    if (type != format.name || !format.decode) continue;
    if (dst.size() % format.block_size != 0 ||
        dst.size() / format.block_size * format.block_bytes != src.size())
      throw nb::value_error("dequantize: source and destination sizes do not match");
    nb::gil_scoped_release release;
    dequantize(format, src.data(), dst.size(), dst.data(), n_threads);
    return;
  }
  throw nb::value_error(("dequantize: unsupported type " + type).c_str());
}

nb::tuple add_magnitudes_array(ConstFloats values, Counts bins, int n_threads) {
  if (bins.size() != kHistogramBins) throw nb::value_error("add_magnitudes: wrong number of bins");
  MagnitudeCount count;
  {
    nb::gil_scoped_release release;
    count = add_magnitudes({values.data(), values.size()}, {bins.data(), bins.size()}, n_threads);
  }
  return nb::make_tuple(count.zeros, count.non_finite);
}

// Rows in two bits are no blocks; tests of the kernels name them like one.
constexpr BlockFormat kTwoBitsFormat{kTwoBits, "two_bits", 4, 1, nullptr};

const BlockFormat& format_of(const std::string& name) {
  if (name == kTwoBitsFormat.name) return kTwoBitsFormat;
  for (const auto& format : all_formats())
    if (name == format.name) return format;
  throw nb::value_error(("unknown type " + name).c_str());
}

const Kernels& kernels_of(const std::string& name) {
  if (name.empty()) return *usable_kernels().front();
  if (const Kernels* found = find_kernels(name.c_str())) return *found;
  throw nb::value_error(("kernels " + name + " do not run on this processor").c_str());
}

// A matrix of rows of k weights, or of their first planes, and one activation vector for it: what the
// tests of the kernels call. Sizes are checked here, so that a wrong test cannot crash.
struct KernelTest {
  const Kernels& kernels;
  const BlockFormat& format;
  Bytes weights;
  size_t k, row_bytes, rows;

  KernelTest(const std::string& table, const std::string& type, Bytes w, size_t width,
             bool planes = false)
      : kernels(kernels_of(table)), format(format_of(type)), weights(w), k(width) {
    if (!kernels.gemv_rows[format.type]) throw nb::value_error("no kernel for this type");
    if (k == 0 || k % format.block_size != 0) throw nb::value_error("width is not whole blocks");
    if (planes && !kernels.gemv_planes[format.type]) throw nb::value_error("no kernel for planes");
    row_bytes = k / format.block_size *
                (planes ? find_planes(format.type)->base_bytes() : format.block_bytes);
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

  // The second plane of every row, or null for none.
  const uint8_t* rest(const std::optional<Bytes>& plane) const {
    if (plane && plane->size() != rows * k / format.block_size * find_planes(format.type)->rest_bytes())
      throw nb::value_error("rest has the wrong size");
    return plane ? plane->data() : nullptr;
  }

  size_t count(const std::optional<Indices>& list) const { return list ? list->size() : rows; }
};

struct Quantized {
  std::vector<int8_t> high, low;
  std::vector<float> d, sum, sum16;

  Quantized(const Kernels& kernels, const float* x, size_t n)
      : high(n), low(n), d(n / 32), sum(n / 32), sum16(n / 16) {
    if (n % 32 == 0)
      kernels.quantize(x, n, high.data(), low.data(), d.data(), sum.data(), sum16.data());
  }
  Activation with(const float* x) const {
    return {x, high.data(), low.data(), d.data(), sum.data(), sum16.data()};
  }
};

void test_gemv_rows(const std::string& table, const std::string& type, Bytes w, ConstFloats x,
                    std::optional<Indices> list, Floats y) {
  const KernelTest t(table, type, w, x.size());
  t.check(list);
  if (y.size() != t.count(list)) throw nb::value_error("y has the wrong size");
  const Quantized quantized(t.kernels, x.data(), x.size());
  t.kernels.gemv_rows[t.format.type](w.data(), t.row_bytes, list ? list->data() : nullptr, 0,
                                     t.count(list), t.k, quantized.with(x.data()), y.data());
}

void test_axpy_rows(const std::string& table, const std::string& type, Bytes w,
                    ConstFloats coefficient, std::optional<Indices> list, Floats y) {
  const KernelTest t(table, type, w, y.size());
  t.check(list);
  if (coefficient.size() != t.count(list)) throw nb::value_error("one coefficient per row");
  if (!t.kernels.axpy_rows[t.format.type]) throw nb::value_error("no sums of rows of this type");
  t.kernels.axpy_rows[t.format.type](w.data(), t.row_bytes, list ? list->data() : nullptr, 0,
                                     t.count(list), t.k, coefficient.data(), y.data());
}

void test_gemv_planes(const std::string& table, const std::string& type, Bytes base,
                      std::optional<Bytes> rest, ConstFloats x, std::optional<Indices> list,
                      Floats y) {
  const KernelTest t(table, type, base, x.size(), true);
  t.check(list);
  if (y.size() != t.count(list)) throw nb::value_error("y has the wrong size");
  const Quantized quantized(t.kernels, x.data(), x.size());
  t.kernels.gemv_planes[t.format.type](base.data(), t.rest(rest), list ? list->data() : nullptr, 0,
                                       t.count(list), t.k, quantized.with(x.data()), y.data());
}

void test_axpy_planes(const std::string& table, const std::string& type, Bytes base,
                      std::optional<Bytes> rest, ConstFloats coefficient,
                      std::optional<Indices> list, Floats y) {
  const KernelTest t(table, type, base, y.size(), true);
  t.check(list);
  if (coefficient.size() != t.count(list)) throw nb::value_error("one coefficient per row");
  t.kernels.axpy_planes[t.format.type](base.data(), t.rest(rest), list ? list->data() : nullptr, 0,
                                       t.count(list), t.k, coefficient.data(), y.data());
}

void test_decode(const std::string& table, const std::string& type, Bytes w, Floats y) {
  const KernelTest t(table, type, w, y.size());
  if (t.rows != 1) throw nb::value_error("decode takes one row");
  t.kernels.decode(t.format.type, w.data(), t.k, y.data());
}

// y (T, rows) for x (T, k), through the panels of prefill.
void test_gemm(const std::string& table, const std::string& type, Bytes w, Rows x, WritableRows y,
               bool half) {
  const KernelTest t(table, type, w, x.shape(1));
  if (y.shape(0) != x.shape(0) || y.shape(1) != t.rows) throw nb::value_error("y: wrong shape");
  const size_t tokens = x.shape(0);
  std::vector<float> rows(t.k * kPanel), panel(t.k * kPanel);
  for (size_t first = 0; first < t.rows; first += kPanel) {
    const size_t n = std::min(kPanel, t.rows - first);
    for (size_t r = 0; r < n; ++r)
      t.kernels.decode(t.format.type, w.data() + (first + r) * t.row_bytes, t.k, &rows[r * t.k]);
    float* to = y.data() + first;
    if (half) {
      if (!t.kernels.gemm_bf16 || t.k % 2 != 0) throw nb::value_error("no bfloat16 product");
      std::vector<uint16_t> panel_half(t.k * kPanel), x_half(x.size());
      t.kernels.panel_bf16(rows.data(), n, t.k, panel_half.data());
      t.kernels.to_bf16(x.data(), x.size(), x_half.data());
      t.kernels.gemm_bf16(panel_half.data(), n, t.k, x_half.data(), t.k, tokens, false, to, t.rows);
    } else {
      t.kernels.panel_f32(rows.data(), n, t.k, panel.data());
      t.kernels.gemm_f32(panel.data(), n, t.k, x.data(), t.k, tokens, false, to, t.rows);
    }
  }
}

void test_activation(const std::string& table, const std::string& name, Floats x) {
  const Kernels& kernels = kernels_of(table);
  if (name == "silu") return kernels.silu(x.data(), x.size());
  if (name == "gelu_tanh") return kernels.gelu_tanh(x.data(), x.size());
  if (name == "softmax" && x.size() > 0) {
    const float sum = kernels.softmax_numerators(x.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) x.data()[i] /= sum;
    return;
  }
  throw nb::value_error("unknown function");
}

// The engine with the file it runs, which is mapped, or of which some parts are in memory and others come
// from the disk when they are needed.
class BoundEngine {
 public:
  // The mapping must outlive the engine.
  BoundEngine(const Mapping& mapping, const std::string& kernels, int n_threads, uint32_t context)
      : mapping_(&mapping), model_(read_packed(mapping.data(), mapping.size())),
        kernels_(kernels_of(kernels)) {
    start(n_threads, context);
  }

  // The first header_bytes of the file are its header; load() reads the weights.
  BoundEngine(const std::string& path, uint64_t header_bytes, const std::string& kernels,
              int n_threads, uint32_t context)
      : file_(std::make_unique<File>(path, true)), image_(std::make_unique<Pages>(file_->size())),
        kernels_(kernels_of(kernels)) {
    if (header_bytes > file_->size()) throw nb::value_error("the header is longer than the file");
    fallow::load(*file_, {{0, header_bytes}}, *image_);
    model_ = read_packed(image_->data(), file_->size());
    image_->forget(0, header_bytes);
    start(n_threads, context);
  }

  // The threads of an engine do not exist in a process that was forked from its own: there nothing
  // waits for them, and what they used is left where it is.
  ~BoundEngine() {
    if (getpid() == process_) return;
    engine_.release();
    streamer_.release();
    for (auto& rows : file_rows_) rows.release();
    file_.release();
    image_.release();
  }

  // Reads parts (offset, bytes) of the file into memory.
  void load(const std::vector<std::pair<uint64_t, uint64_t>>& parts) {
    if (!file_) throw nb::value_error("this engine's file is mapped");
    std::vector<Extent> extents;
    for (const auto& [offset, size] : parts) extents.push_back(extent(offset, size));
    nb::gil_scoped_release release;
    fallow::load(*file_, extents, *image_);
  }

  // The embedding, or the head, or one that is both, stays in the file, from `offset` on, but for `room`
  // rows; all of them come in ranges of that many bytes.
  void rows_from_file(bool embedding, bool head, uint64_t offset, size_t room,
                      uint64_t range_bytes) {
    const Matrix& w = embedding ? model_.embed_tokens : model_.lm_head;
    extent(offset, w.bytes());
    if (!(embedding || head) || room == 0 || room > w.rows || (head && model_.lm_head.rows != w.rows))
      throw nb::value_error("no rows, or no room for them");
    file_rows_.push_back(
        std::make_unique<FileRows>(*file_, offset, w.row_bytes, w.rows, room, range_bytes));
    FileRows* rows = file_rows_.back().get();
    if (embedding) engine_->set_embedding(rows);
    if (head) engine_->set_head(rows);
  }

  // (layer, [(matrix, its second plane?, offset, bytes)]), layers ascending
  using PyUnit =
      std::pair<size_t, std::vector<std::tuple<std::string, bool, uint64_t, uint64_t>>>;

  // What is not in memory, and in how many slots of the largest unit's size it passes through.
  void stream(const std::vector<PyUnit>& list, size_t n_slots) {
    if (!file_ || list.empty() || n_slots == 0) throw nb::value_error("nothing to stream");
    std::vector<std::vector<Extent>> units;
    std::vector<StreamedLayer> layers(model_.layers.size());
    for (const auto& [layer, parts] : list) {
      if (layer >= layers.size() || !layers[layer].places.empty() || parts.empty())
        throw nb::value_error("no such layer");
      StreamedLayer& streamed = layers[layer];
      streamed = {units.size(), {}, true};
      uint64_t at = 0;
      units.emplace_back();
      for (const auto& [matrix, rest, offset, size] : parts) {
        Layer& l = model_.layers[layer];
        Matrix& m = matrix == "gate_proj" ? l.gate_proj : matrix == "up_proj" ? l.up_proj
                                                                              : l.down_proj_t;
        streamed.places.emplace_back(rest ? &m.rest : &m.data, at);
        streamed.only_rest = streamed.only_rest && rest;
        units.back().push_back(extent(offset, size));
        at += units.back().back().room();
      }
    }
    streamer_ = std::make_unique<Streamer>(*file_, std::move(units), n_slots);
    engine_->set_stream(streamer_.get(), std::move(layers));
  }

  void forward(ConstIndices tokens, uint32_t position, bool all, bool dense, WritableRows logits) {
    const size_t n = tokens.size();
    if (position > engine_->held()) throw nb::value_error("the cache does not hold so many tokens");
    if (n == 0 || n > engine_->context() - position)
      throw nb::value_error("no tokens, or more than the context has room for");
    for (size_t i = 0; i < n; ++i)
      if (tokens.data()[i] < 0 ||
          static_cast<uint32_t>(tokens.data()[i]) >= model_.config.vocab_size)
        throw nb::value_error("a token id is outside the vocabulary");
    if (logits.shape(0) != (all ? n : 1) || logits.shape(1) != model_.config.vocab_size)
      throw nb::value_error("logits have the wrong shape");
    if (getpid() != process_) throw nb::value_error("this engine was made before a fork");
    nb::gil_scoped_release release;
    asked_ = std::chrono::steady_clock::now();
    engine_->forward(tokens.data(), n, position, all, dense, logits.data());
    if (mapping_) mapping_->check();
  }

  // (rank, in, type of out, out): see Correction
  using PyCorrection = std::tuple<size_t, Bytes, std::string, Bytes>;
  // (layer, tap, how, value, weight or None, error or None, correction or None)
  using PyCut = std::tuple<size_t, size_t, size_t, double, std::optional<ConstFloats>,
                           std::optional<ConstFloats>, std::optional<PyCorrection>>;

  void set_cuts(const std::vector<PyCut>& list) {
    std::vector<LayerCuts> cuts(list.empty() ? 0 : model_.layers.size());
    for (const auto& [layer, tap, how, value, weight, error, correction] : list) {
      if (layer >= cuts.size() || tap >= kTaps || how > 3) throw nb::value_error("no such cut");
      Cut& cut = cuts[layer][tap];
      cut.by = static_cast<Cut::By>(how);
      cut.value = value;
      const auto copy = [&](const std::optional<ConstFloats>& from, std::vector<float>& to) {
        if (!from) return;
        if (from->size() != width_of(static_cast<Tap>(tap)))
          throw nb::value_error("a cut's weight or error has the wrong size");
        to.assign(from->data(), from->data() + from->size());
      };
      copy(weight, cut.weight);
      copy(error, cut.error);
      if (tap == kGateCoarse && (cut.weight.empty() || cut.error.empty()))
        throw nb::value_error("coarse gates need a weight and an error");
      if (correction) cut.correction = correction_of(*correction);
    }
    engine_->set_cuts(std::move(cuts));
  }

  nb::dict stats() const {
    const Timing& t = engine_->timing();
    nb::dict result;
    result["tokens"] = engine_->tokens();
    result["bytes_read"] = engine_->bytes_read();
    result["active"] = engine_->active();
    nb::dict seconds;
    seconds["attention_proj"] = t.attention_proj;
    seconds["attention"] = t.attention;
    seconds["ffn"] = t.ffn;
    seconds["select"] = t.select;
    seconds["head"] = t.head;
    seconds["other"] = t.other;
    seconds["disk"] = t.disk;
    result["seconds"] = seconds;
    uint64_t bytes = streamer_ ? streamer_->bytes_read() : 0, wanted = 0, missing = 0;
    for (const auto& rows : file_rows_) {
      bytes += rows->bytes_read();
      wanted += rows->wanted();
      missing += rows->missing();
    }
    nb::dict disk;
    disk["bytes"] = bytes;
    disk["rows"] = wanted;
    disk["missing_rows"] = missing;
    disk["waits"] = streamer_ ? streamer_->waits() : 0;
    disk["in_time"] = streamer_ ? streamer_->in_time() : 0;
    result["disk"] = disk;
    return result;
  }

  void reset_stats() {
    engine_->reset_stats();
    if (streamer_) streamer_->reset_stats();
    for (const auto& rows : file_rows_) rows->reset_stats();
  }

  std::vector<float> down_norm(size_t layer) const {
    const float* values = model_.layers.at(layer).down_norm;
    return {values, values + model_.config.intermediate_size};
  }

  const Packed& model() const { return model_; }
  Engine& engine() { return *engine_; }
  const char* kernels() const { return kernels_.name; }

 private:
  void start(int n_threads, uint32_t context) {
    if (n_threads < 1 || n_threads > 1024) throw nb::value_error("threads must be 1 to 1024");
    if (context < 1 || context > model_.config.context_length)
      throw nb::value_error("context must be 1 to the model's own");
    engine_ = std::make_unique<Engine>(model_, kernels_, n_threads, context,
                                       file_ ? Engine::kSmallBlock : Engine::kBlock);
    engine_->set_pause([this] { answer_signals(); });
  }

  // Lets Python act on Ctrl-C within a long pass.
  void answer_signals() {
    const auto now = std::chrono::steady_clock::now();
    if (now - asked_ < std::chrono::milliseconds(100)) return;
    asked_ = now;
    nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }

  // A part of the file that is not mapped.
  Extent extent(uint64_t offset, uint64_t size) const {
    if (!file_ || offset % kSector != 0 || size == 0 || offset > file_->size() ||
        size > file_->size() - offset)
      throw nb::value_error("no such part of the file");
    return {offset, size};
  }

  size_t width_of(Tap tap) const {
    const Config& c = model_.config;
    if (tap == kOInput) return size_t{c.n_heads} * c.head_dim;
    return tap < kGatePre || tap == kFfnOut ? c.hidden_size : c.intermediate_size;
  }

  Correction correction_of(const PyCorrection& from) const {
    const auto& [rank, in, type, out] = from;
    const BlockFormat& format = format_of(type);
    const size_t hidden = model_.config.hidden_size, d_ff = model_.config.intermediate_size;
    if (rank == 0 || (format.type != kQ8_0 && format.type != kF16) || d_ff % format.block_size != 0 ||
        in.size() != rank * hidden * 2 ||
        out.size() != rank * (d_ff / format.block_size) * format.block_bytes)
      throw nb::value_error("a cut's correction has the wrong size or type");
    return {rank, {in.data(), in.data() + in.size()}, {out.data(), out.data() + out.size()},
            format.type};
  }

  const pid_t process_ = getpid();
  std::chrono::steady_clock::time_point asked_;  // Python for its signals
  // Either the mapped file or, in this order since later ones read from earlier ones, these.
  const Mapping* mapping_ = nullptr;
  std::unique_ptr<File> file_;
  std::unique_ptr<Pages> image_;
  Packed model_;
  const Kernels& kernels_;
  std::vector<std::unique_ptr<FileRows>> file_rows_;
  std::unique_ptr<Streamer> streamer_;
  std::unique_ptr<Engine> engine_;
};

// Bytes per second at which n_threads threads read n_bytes of memory, once.
double read_bandwidth(size_t n_bytes, int n_threads) {
  if (n_threads < 1 || n_threads > 1024) throw nb::value_error("threads must be 1 to 1024");
  nb::gil_scoped_release release;
  const Kernels& kernels = *usable_kernels().front();
  const std::vector<float> data(n_bytes / sizeof(float), 1.0f);
  std::vector<float> sums(static_cast<size_t>(n_threads));
  ThreadPool pool(n_threads);
  const auto read = [&](int worker) {
    const Share share = share_of(data.size(), worker, n_threads);
    sums[static_cast<size_t>(worker)] =
        kernels.sum_squares(data.data() + share.begin, share.end - share.begin);
  };
  pool.run(read);
  const auto start = std::chrono::steady_clock::now();
  pool.run(read);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return static_cast<double>(n_bytes) / seconds.count();
}

// Seconds that n_threads threads take for one pass over a matrix (rows, width) of a type: through
// gemv_rows and axpy_rows, whole and with the listed rows alone, and for reading its bytes.
nb::dict time_rows(const std::string& type, size_t rows, size_t width, Indices list,
                   int n_threads) {
  const Kernels& kernels = *usable_kernels().front();
  const BlockFormat& format = format_of(type);
  if (n_threads < 1 || n_threads > 1024) throw nb::value_error("threads must be 1 to 1024");
  if (rows == 0 || width == 0 || width % format.block_size != 0)
    throw nb::value_error("width is not whole blocks");
  for (size_t i = 0; i < list.size(); ++i)
    if (list.data()[i] < 0 || static_cast<size_t>(list.data()[i]) >= rows)
      throw nb::value_error("a row is outside the matrix");
  const size_t row_bytes = width / format.block_size * format.block_bytes;
  std::vector<uint8_t> weights(rows * row_bytes, 1);
  std::vector<float> x(width, 0.5f), y(rows), coefficient(rows, 0.5f);
  std::vector<float> sums(static_cast<size_t>(n_threads) * width);
  std::vector<float> read(static_cast<size_t>(n_threads));
  const Quantized quantized(kernels, x.data(), width);
  const Activation activation = quantized.with(x.data());
  ThreadPool pool(n_threads);
  const auto seconds = [&](auto body) {
    pool.run(body);
    const auto start = std::chrono::steady_clock::now();
    pool.run(body);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const auto gemv = [&](const int32_t* indices, size_t n) {
    return seconds([&, indices, n](int worker) {
      const Share s = share_of(n, worker, n_threads);
      kernels.gemv_rows[format.type](weights.data(), row_bytes, indices ? indices + s.begin : nullptr,
                                     indices ? 0 : s.begin, s.end - s.begin, width, activation,
                                     y.data() + s.begin);
    });
  };
  const auto axpy = [&](const int32_t* indices, size_t n) {
    return seconds([&, indices, n](int worker) {
      const Share s = share_of(n, worker, n_threads);
      kernels.axpy_rows[format.type](weights.data(), row_bytes, indices ? indices + s.begin : nullptr,
                                     indices ? 0 : s.begin, s.end - s.begin, width,
                                     coefficient.data(),
                                     sums.data() + static_cast<size_t>(worker) * width);
    });
  };
  nb::dict result;
  result["bytes"] = weights.size();
  result["read"] = seconds([&](int worker) {
    const Share s = share_of(weights.size() / sizeof(float), worker, n_threads);
    read[static_cast<size_t>(worker)] = kernels.sum_squares(
        reinterpret_cast<const float*>(weights.data()) + s.begin, s.end - s.begin);
  });
  result["gemv"] = gemv(nullptr, rows);
  result["gemv_rows"] = gemv(list.data(), list.size());
  result["axpy"] = axpy(nullptr, rows);
  result["axpy_rows"] = axpy(list.data(), list.size());
  return result;
}

nb::bytes quantize_k_array(const std::string& type, ConstFloats x, int n_threads) {
  const BlockFormat& format = format_of(type);
  if (x.size() % format.block_size != 0) throw nb::value_error("values are not whole blocks");
  std::vector<uint8_t> out(x.size() / format.block_size * format.block_bytes);
  bool done;
  {
    nb::gil_scoped_release release;
    done = quantize_k(format.type, x.data(), x.size(), out.data(), n_threads);
  }
  if (!done) throw nb::value_error(("cannot quantize to " + type).c_str());
  return nb::bytes(out.data(), out.size());
}

BitRows bit_rows(const BitArray& rows) {
  if (rows.shape(1) == 0 || rows.shape(1) % kLineWords != 0)
    throw nb::value_error("rows of bits must be whole lines of 64 bytes");
  return {rows.data(), rows.shape(0), rows.shape(1)};
}

void nearest_rows(BitArray rows, BitArray codebook, Indices offset, size_t planes,
                  WritableIndices labels, WritableIndices overlap, int n_threads,
                  const std::string& kernels) {
  const BitRows x = bit_rows(rows), c = bit_rows(codebook);
  if (planes != 1 && planes != kWeightPlanes) throw nb::value_error("planes must be 1 or 4");
  if (x.words != c.words || offset.size() == 0 || c.n != offset.size() * planes ||
      labels.size() != x.n || overlap.size() != x.n)
    throw nb::value_error("nearest_rows: sizes do not match");
  const Kernels& table = kernels_of(kernels);
  nb::gil_scoped_release release;
  nearest(table, x, c, planes, offset.data(), labels.data(), overlap.data(), n_threads);
}

void row_overlaps(BitArray rows, BitArray others, CountRows counts, int n_threads,
                  const std::string& kernels) {
  const BitRows x = bit_rows(rows), y = bit_rows(others);
  if (x.words != y.words || counts.shape(0) != x.n || counts.shape(1) != y.n)
    throw nb::value_error("row_overlaps: sizes do not match");
  const Kernels& table = kernels_of(kernels);
  nb::gil_scoped_release release;
  overlaps(table, x, y, counts.data(), n_threads);
}

void add_rows_of_bits(BitArray rows, Indices labels, CountRows counts, int n_threads) {
  const BitRows x = bit_rows(rows);
  const size_t n_labels = counts.shape(0);
  if (labels.size() != x.n || counts.shape(1) != 64 * x.words || n_threads < 1)
    throw nb::value_error("add_rows: sizes do not match");
  for (size_t i = 0; i < x.n; ++i)
    if (labels.data()[i] >= 0 && static_cast<size_t>(labels.data()[i]) >= n_labels)
      throw nb::value_error("add_rows: a label is outside the counts");
  nb::gil_scoped_release release;
  add_rows(x, labels.data(), n_labels, counts.data(), n_threads);
}

void check_rows(const Rows& scores, const Floats& thresholds) {
  if (scores.shape(0) != thresholds.size())
    throw nb::value_error("one threshold per row of scores is needed");
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Compiled core of fallow.";
  nb::exception<GgufError>(m, "GgufError", PyExc_ValueError);

  nb::exception<PackedError>(m, "PackedError", PyExc_ValueError);
  nb::exception<DiskError>(m, "DiskError", PyExc_OSError);

  m.attr("HISTOGRAM_BINS") = kHistogramBins;
  m.attr("HISTOGRAM_BINS_PER_OCTAVE") = kBinsPerOctave;
  m.attr("HISTOGRAM_MIN_EXPONENT") = kMinExponent;

  nb::dict formats;
  for (const auto& format : all_formats())
    if (format.decode)
      formats[format.name] = nb::make_tuple(format.block_size, format.block_bytes);
  m.attr("FORMATS") = formats;

  m.def("gguf_header", &gguf_header, "data"_a,
        "Header of a GGUF file (uint8 array): fields, and tensors as tuples (name, shape "
        "outermost first, type, byte offset, bytes). Raises GgufError.");
  m.def("dequantize", &dequantize_array, "type"_a, "src"_a, "dst"_a, "n_threads"_a = 1,
        "Decodes the blocks in src into dst (float32, flat).");
  m.def("add_magnitudes", &add_magnitudes_array, "values"_a, "bins"_a, "n_threads"_a = 1,
        "Adds |values| to the log-spaced bins; returns (exact zeros, non-finite values).");
  m.def(
      "topk_thresholds",
      [](Rows scores, uint64_t k, Floats thresholds, int n_threads) {
        check_rows(scores, thresholds);
        nb::gil_scoped_release release;
        topk_thresholds(scores.data(), scores.shape(0), scores.shape(1), k, thresholds.data(),
                        n_threads);
      },
      "scores"_a, "k"_a, "thresholds"_a, "n_threads"_a = 1,
      "Per row: the threshold that leaves the k largest scores above it.");
  m.def(
      "tail_thresholds",
      [](Rows scores, double tau, Floats thresholds, int n_threads) {
        check_rows(scores, thresholds);
        nb::gil_scoped_release release;
        tail_thresholds(scores.data(), scores.shape(0), scores.shape(1), tau, thresholds.data(),
                        n_threads);
      },
      "scores"_a, "tau"_a, "thresholds"_a, "n_threads"_a = 1,
      "Per row: the largest score whose tail stays within tau^2 of the row's sum of squares.");

  m.attr("LINE_WORDS") = kLineWords;
  m.attr("WEIGHT_PLANES") = kWeightPlanes;
  m.def("nearest_rows", &nearest_rows, "rows"_a, "codebook"_a, "offset"_a, "planes"_a, "labels"_a,
        "overlap"_a, "n_threads"_a = 1, "kernels"_a = "",
        "For each row of bits (uint64, whole lines) the label c with the largest 2 overlap - "
        "offset[c], and that overlap; see csrc/bits.h.");
  m.def("row_overlaps", &row_overlaps, "rows"_a, "others"_a, "counts"_a, "n_threads"_a = 1,
        "kernels"_a = "", "counts[i, j] = bits in both rows[i] and others[j].");
  m.def("add_rows", &add_rows_of_bits, "rows"_a, "labels"_a, "counts"_a, "n_threads"_a = 1,
        "Adds each row's bits to counts[label], labels below 0 left out.");

  m.def("quantize_k", &quantize_k_array, "type"_a, "x"_a, "n_threads"_a = 1,
        "Blocks (bytes) of Q4_K, Q5_K or Q6_K that are close to x.");

  m.def("read_bandwidth", &read_bandwidth, "n_bytes"_a, "n_threads"_a,
        "Bytes per second at which that many threads read that much memory.");

  m.def("time_rows", &time_rows, "type"_a, "rows"_a, "width"_a, "list"_a, "n_threads"_a,
        "Seconds of one pass over a matrix: read, gemv, gemv_rows, axpy, axpy_rows.");

  std::vector<std::string> tables;
  for (const Kernels* table : usable_kernels()) tables.emplace_back(table->name);
  m.attr("KERNELS") = tables;
  m.def("test_gemv_rows", &test_gemv_rows, "kernels"_a, "type"_a, "weights"_a, "x"_a,
        "rows"_a.none(), "y"_a);
  m.def("test_axpy_rows", &test_axpy_rows, "kernels"_a, "type"_a, "weights"_a, "coefficient"_a,
        "rows"_a.none(), "y"_a);
  m.def("test_gemv_planes", &test_gemv_planes, "kernels"_a, "type"_a, "base"_a, "rest"_a.none(),
        "x"_a, "rows"_a.none(), "y"_a);
  m.def("test_axpy_planes", &test_axpy_planes, "kernels"_a, "type"_a, "base"_a, "rest"_a.none(),
        "coefficient"_a, "rows"_a.none(), "y"_a);
  m.def("test_decode", &test_decode, "kernels"_a, "type"_a, "weights"_a, "y"_a);
  m.def("test_gemm", &test_gemm, "kernels"_a, "type"_a, "weights"_a, "x"_a, "y"_a,
        "half"_a);
  m.def("test_activation", &test_activation, "kernels"_a, "name"_a, "x"_a);

  nb::list taps;
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "gate_pre", "gate_act", "up", "inter", "down_proj", "ffn_out",
                           "gate_coarse", "up_coarse", "down_coarse"})
    taps.append(name);
  m.attr("TAPS") = taps;
  m.attr("FEW") = Engine::kFew;

  nb::class_<Mapping>(m, "Mapping")
      .def(nb::init<const std::string&>(), "path"_a)
      .def_prop_ro("data",
                   [](const Mapping& mapping) {
                     return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(
                         mapping.data(), {mapping.size()}, nb::find(mapping));
                   })
      .def("forget", &Mapping::forget, "Lets go of what was read; it is read again when it is used.")
      .def("check", &Mapping::check,
           "Raises DiskError if the file was cut or written to, or could not be read.");

  nb::class_<BoundEngine>(m, "Engine")
      .def(nb::init<const Mapping&, const std::string&, int, uint32_t>(), nb::keep_alive<1, 2>(),
           "mapping"_a, "kernels"_a, "n_threads"_a, "context"_a)
      .def(nb::init<const std::string&, uint64_t, const std::string&, int, uint32_t>(), "path"_a,
           "header_bytes"_a, "kernels"_a, "n_threads"_a, "context"_a)
      .def("load", &BoundEngine::load, "parts"_a)
      .def("rows_from_file", &BoundEngine::rows_from_file, "embedding"_a, "head"_a, "offset"_a,
           "room"_a, "range_bytes"_a)
      .def("stream", &BoundEngine::stream, "units"_a, "n_slots"_a)
      .def("forward", &BoundEngine::forward, "tokens"_a, "position"_a, "all"_a, "dense"_a, "logits"_a)
      .def("set_cuts", &BoundEngine::set_cuts, "cuts"_a)
      .def("stats", &BoundEngine::stats)
      .def("reset_stats", &BoundEngine::reset_stats)
      .def("set_shortlist",
           [](BoundEngine& e, float nats, size_t most) { e.engine().set_shortlist(nats, most); },
           "nats"_a, "most"_a)
      .def("down_norm", &BoundEngine::down_norm, "layer"_a)
      .def_prop_ro("context", [](BoundEngine& e) { return e.engine().context(); })
      .def_prop_ro("kernels", &BoundEngine::kernels)
      .def_prop_ro("n_layers", [](const BoundEngine& e) { return e.model().config.n_layers; })
      .def_prop_ro("vocab_size", [](const BoundEngine& e) { return e.model().config.vocab_size; })
      .def_prop_ro("intermediate_size",
                   [](const BoundEngine& e) { return e.model().config.intermediate_size; });
}
