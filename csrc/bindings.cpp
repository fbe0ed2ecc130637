// Everything that Python sees of the core. Types, shapes and contiguity are checked by the argument
// types; arrays are passed without copies and the GIL is released while the core works.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "bindings.h"
#include "engine/packed.h"
#include "engine/tiles.h"
#include "formats/gguf.h"
#include "formats/quantize.h"
#include "parallel.h"
#include "platform/file.h"
#include "stats/bits.h"
#include "stats/histogram.h"
#include "stats/select.h"

using namespace nb::literals;
using namespace fallow;

namespace {

// A header, and the file's bytes, of which its names and values are made when they are asked for.
struct Header {
  Bytes data;
  GgufHeader parsed;
};

Header read_header(Bytes data) {
  nb::gil_scoped_release release;
  return {data, parse_gguf(data.data(), data.size())};
}

nb::str as_str(std::string_view text) { return nb::str(text.data(), text.size()); }

nb::object as_array(const GgufField& field) {
  const auto dtype_of = [](uint32_t type) -> nb::dlpack::dtype {
    switch (type) {
      case kGgufUint8: return nb::dtype<uint8_t>();
      case kGgufInt8: return nb::dtype<int8_t>();
      case kGgufUint16: return nb::dtype<uint16_t>();
      case kGgufInt16: return nb::dtype<int16_t>();
      case kGgufUint32: return nb::dtype<uint32_t>();
      case kGgufInt32: return nb::dtype<int32_t>();
      case kGgufFloat32: return nb::dtype<float>();
      case kGgufBool: return nb::dtype<bool>();
      case kGgufUint64: return nb::dtype<uint64_t>();
      case kGgufInt64: return nb::dtype<int64_t>();
      default: return nb::dtype<double>();
    }
  };
  const nb::bytes values(field.bytes.data(), field.bytes.size());  // aligned, and the file may change
  const size_t count = field.count;
  return nb::cast(nb::ndarray<nb::numpy, nb::ro>(values.c_str(), 1, &count, values, nullptr, dtype_of(field.type)));
}

nb::object as_object(const GgufField& field) {
  if (field.is_array && field.type == kGgufString) {
    nb::list strings;
    field.each_string([&](std::string_view text) {
      PyObject* made = as_str(text).release().ptr();
      if (text.size() <= 2) PyUnicode_InternInPlace(&made);  // 64 bytes each, where the file has 10
      strings.append(nb::steal(made));
    });
    return strings;
  }
  if (field.is_array) return as_array(field);
  return std::visit(
      [](auto value) -> nb::object {
        if constexpr (std::is_same_v<decltype(value), std::string_view>) return as_str(value);
        else return nb::cast(value);
      },
      field.at(0));
}

template <class Named>
const Named& or_key_error(const Named* found, const std::string& name) {
  if (!found) throw nb::key_error(name.c_str());
  return *found;
}

nb::tuple tensor_tuple(const GgufTensor& tensor) {
  const auto shape = tensor.shape();
  return nb::make_tuple(nb::tuple(nb::cast(std::vector<uint64_t>(shape.begin(), shape.end()))),
                        find_format(tensor.type)->name, tensor.offset, tensor.n_bytes);
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

// Seconds that n_threads threads take for one pass over a matrix (rows, width) of a type that lies as an
// engine's do: for products with it and sums of its rows, whole, in tiles if rows are a multiple of
// TILE_ROWS and the type has some, and of the listed rows alone; and for reading its bytes.
nb::dict time_rows(const std::string& type, size_t rows, size_t width, Indices list,
                   int n_threads, const std::string& set) {
  const Kernels& kernels = kernels_of(set);
  const BlockFormat& format = format_of(type);
  if (n_threads < 1 || n_threads > 1024) throw nb::value_error("threads must be 1 to 1024");
  if (rows == 0 || width == 0 || width % format.block_size != 0)
    throw nb::value_error("width is not whole blocks");
  for (size_t i = 0; i < list.size(); ++i)
    if (list.data()[i] < 0 || static_cast<size_t>(list.data()[i]) >= rows)
      throw nb::value_error("a row is outside the matrix");
  const size_t row_bytes = width / format.block_size * format.block_bytes;
  const size_t bytes = rows * row_bytes;
  Pages weights(bytes);
  weights.expect(0, bytes);
  std::fill_n(weights.data(), bytes, uint8_t{1});
  std::vector<float> x(width, 0.5f), y(rows), coefficient(rows, 0.5f);
  std::vector<float> sums(static_cast<size_t>(n_threads) * width);
  std::vector<float> read(static_cast<size_t>(n_threads));
  const Quantized quantized(kernels, x.data(), width, true);
  const Activation activation = quantized.with(x.data());
  ThreadPool pool(n_threads);
  const auto seconds = [&](auto body) {
    pool.run(body);
    const auto start = std::chrono::steady_clock::now();
    pool.run(body);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const auto gemv = [&](const int32_t* indices, size_t n) {
    const bool tiled = !indices && has_tiles(kernels, Layout::kDwordTiles, format.type, rows, row_bytes);
    const GemvTokens tiles = tiled ? kernels.gemv_tiles[format.type] : nullptr;
    return seconds([&, indices, n](int worker) {
      const Share s = share_of_rows(n, worker, n_threads);
      const size_t begin = indices ? 0 : s.begin, count = s.end - s.begin;
      float* to = y.data() + s.begin;
      if (tiles) return tiles(weights.data(), row_bytes, begin, count, width, &activation, 1, to, rows);
      kernels.gemv_rows[format.type](weights.data(), row_bytes, indices ? indices + s.begin : nullptr, begin,
                                     count, width, activation, to);
    });
  };
  const auto axpy = [&](const int32_t* indices, size_t n) {
    const bool tiled = !indices && has_tiles(kernels, Layout::kByteTiles, format.type, rows, row_bytes);
    const AxpyTokens tiles = tiled ? kernels.axpy_tiles[format.type] : nullptr;
    return seconds([&, indices, n](int worker) {
      const Share s = share_of_rows(n, worker, n_threads);
      const size_t begin = indices ? 0 : s.begin, count = s.end - s.begin;
      const float* c = coefficient.data() + s.begin;
      float* to = sums.data() + static_cast<size_t>(worker) * width;
      if (tiles) return tiles(weights.data(), row_bytes, begin, count, width, c, rows, 1, to, width);
      kernels.axpy_rows[format.type](weights.data(), row_bytes, indices ? indices + s.begin : nullptr, begin,
                                     count, width, c, to);
    });
  };
  nb::dict result;
  result["bytes"] = bytes;
  result["read"] = seconds([&](int worker) {
    const Share s = share_of(bytes / sizeof(float), worker, n_threads);
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
  // What a program still holds when it ends, as the mapping of a model that it loaded, is no news to its user.
  nb::set_leak_warnings(false);
  nb::exception<GgufError>(m, "GgufError", PyExc_ValueError);

  nb::exception<PackedError>(m, "PackedError", PyExc_ValueError);
  nb::exception<DiskError>(m, "DiskError", PyExc_OSError);
  nb::exception<ThreadError>(m, "ThreadError", PyExc_RuntimeError);

  m.attr("HISTOGRAM_BINS") = kHistogramBins;
  m.attr("HISTOGRAM_BINS_PER_OCTAVE") = kBinsPerOctave;
  m.attr("HISTOGRAM_MIN_EXPONENT") = kMinExponent;

  nb::dict formats;
  for (const auto& format : all_formats())
    if (format.decode)
      formats[format.name] = nb::make_tuple(format.block_size, format.block_bytes);
  m.attr("FORMATS") = formats;

  nb::class_<Header>(m, "GgufHeader", "Of a GGUF file (uint8 array), whose bytes stay where they are.")
      .def("__init__", [](Header* self, Bytes data) { new (self) Header(read_header(std::move(data))); },
           "data"_a, "Raises GgufError.")
      .def_prop_ro("n_fields", [](const Header& h) { return h.parsed.fields.size(); })
      .def_prop_ro("n_tensors", [](const Header& h) { return h.parsed.tensors.size(); })
      .def("field_name", [](const Header& h, size_t i) { return as_str(h.parsed.fields.at(i).name); }, "i"_a)
      .def("tensor_name", [](const Header& h, size_t i) { return as_str(h.parsed.tensors.at(i).name); }, "i"_a)
      .def(
          "value",
          [](const Header& h, const std::string& name) {
            return as_object(or_key_error(h.parsed.find_field(name), name));
          },
          "name"_a, "A bool, int, float, str, list of str, or an array of numbers. Raises KeyError.")
      .def(
          "tensor",
          [](const Header& h, const std::string& name) {
            return tensor_tuple(or_key_error(h.parsed.find_tensor(name), name));
          },
          "name"_a, "(shape outermost first, type, byte offset, bytes). Raises KeyError.");
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
        tail_thresholds(scores.data(), scores.shape(0), scores.shape(1), tau * tau, Mass::kSquare,
                        thresholds.data(), n_threads);
      },
      "scores"_a, "tau"_a, "thresholds"_a, "n_threads"_a = 1,
      "Per row: the largest score whose tail stays within tau^2 of the row's sum of squares.");
  m.def(
      "mass_thresholds",
      [](Rows scores, double share, Floats thresholds, int n_threads) {
        check_rows(scores, thresholds);
        nb::gil_scoped_release release;
        tail_thresholds(scores.data(), scores.shape(0), scores.shape(1), share, Mass::kScore,
                        thresholds.data(), n_threads);
      },
      "scores"_a, "share"_a, "thresholds"_a, "n_threads"_a = 1,
      "Per row: the largest score whose tail stays within a share of the row's sum.");

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

  m.def(
      "check_ffn_file", [](Bytes data) { (void)read_ffn_file(data.data(), data.size()); }, "data"_a,
      "Raises PackedError or GgufError unless it is what `fallow llama pack` writes.");
  m.def("fingerprint", [](Bytes data) { return fingerprint(data.data(), data.size()); }, "data"_a,
        "64 bits that tell models' weights apart.");
  m.def("quantize_k", &quantize_k_array, "type"_a, "x"_a, "n_threads"_a = 1,
        "Blocks (bytes) of Q4_K, Q5_K or Q6_K that are close to x.");

  m.def("read_bandwidth", &read_bandwidth, "n_bytes"_a, "n_threads"_a,
        "Bytes per second at which that many threads read that much memory.");

  m.def("time_rows", &time_rows, "type"_a, "rows"_a, "width"_a, "list"_a, "n_threads"_a,
        "kernels"_a = "",
        "Seconds of one pass over a matrix: read, gemv, gemv_rows, axpy, axpy_rows.");

  std::vector<std::string> tables;
  for (const Kernels* table : usable_kernels()) tables.emplace_back(table->name);
  m.attr("KERNELS") = tables;
  m.attr("TILE_ROWS") = kTileRows;

  bind_engine(m);
}
