// Everything that Python sees of the core. Types, shapes and contiguity are checked by the argument
// types; arrays are passed without copies and the GIL is released while the core works.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "dequant.h"
#include "gguf.h"
#include "histogram.h"
#include "select.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fallow;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::dict gguf_header(Bytes data) {
  GgufHeader header;
  {
    nb::gil_scoped_release release;
    header = parse_gguf(data.data(), data.size());
  }
  nb::dict fields;
  for (auto& field : header.fields)
    fields[field.name.c_str()] = field.is_array ? nb::cast(std::move(field.values))
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

void check_rows(const Rows& scores, const Floats& thresholds) {
  if (scores.shape(0) != thresholds.size())
    throw nb::value_error("one threshold per row of scores is needed");
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Compiled core of fallow.";
  nb::exception<GgufError>(m, "GgufError", PyExc_ValueError);

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
}
