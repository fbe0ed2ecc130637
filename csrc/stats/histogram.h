// Exact counts of magnitudes in log-spaced bins. Memory does not depend on the number of values.
#pragma once

#include <cstdint>
#include <span>

namespace fallow {

// 1024 bins per octave from 2^-64 to 2^32: the bin is read off the float's own bits.
// Bin 0 also takes everything below, zero included; the last bin everything above.
constexpr int kBinsPerOctave = 1024;
constexpr int kMinExponent = -64;
constexpr int kMaxExponent = 32;
constexpr int kHistogramBins = (kMaxExponent - kMinExponent) * kBinsPerOctave;

struct MagnitudeCount {
  uint64_t zeros = 0;       // exactly 0
  uint64_t non_finite = 0;  // NaN or infinite; in no bin
};

// Adds |values| to bins[0, kHistogramBins).
MagnitudeCount add_magnitudes(std::span<const float> values, std::span<uint64_t> bins,
                              int n_threads);

}  // namespace fallow
