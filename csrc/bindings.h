// What the bindings share: types of arrays, which are checked by them and passed without copies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "formats/dequant.h"
#include "kernels/digits.h"
#include "kernels/kernels.h"

namespace nb = nanobind;

namespace fallow {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BitArray = nb::ndarray<const uint64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableIndices = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CountRows = nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// By name. Throw ValueError.
inline const BlockFormat& format_of(const std::string& name) {
  // Rows in two bits are no blocks, but have a name like one.
  static constexpr BlockFormat two_bits{kTwoBits, "two_bits", 4, 1, nullptr};
  if (name == two_bits.name) return two_bits;
  for (const auto& format : all_formats())
    if (name == format.name) return format;
  throw nb::value_error(("unknown type " + name).c_str());
}

inline const Kernels& kernels_of(const std::string& name) {  // "": the fastest
  if (name.empty()) return *usable_kernels().front();
  if (const Kernels* found = find_kernels(name.c_str())) return *found;
  throw nb::value_error(("kernels " + name + " do not run on this processor").c_str());
}

// A vector in the integers that products with quantised weights take.
struct Quantized {
  std::vector<int8_t> high, low;
  std::vector<float> d, sum, sum16;
  bool one_digit = false;

  // In one digit where `may_be_one` and that is enough.
  Quantized(const Kernels& kernels, const float* x, size_t n, bool may_be_one = false)
      : high(n), low(n), d(n / 32), sum(n / 32), sum16(n / 16) {
    if (n % 32 != 0) return;
    if (may_be_one)
      one_digit = quantize_in_digits(kernels, x, n, high.data(), low.data(), d.data(), sum.data(), sum16.data());
    else
      kernels.quantize(x, n, high.data(), low.data(), d.data(), sum.data(), sum16.data());
  }
  Activation with(const float* x) const {
    return {x, high.data(), low.data(), d.data(), sum.data(), sum16.data(), one_digit};
  }
};

void bind_engine(nb::module_& m);

}  // namespace fallow
