#include "stats/histogram.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "parallel.h"

namespace fallow {

MagnitudeCount add_magnitudes(std::span<const float> values, std::span<uint64_t> bins,
                              int n_threads) {
  // A float's exponent and top 10 mantissa bits, counted from 2^kMinExponent.
  constexpr uint32_t kFirst = static_cast<uint32_t>(127 + kMinExponent) * kBinsPerOctave;
  constexpr uint32_t kInfinity = 0x7F800000;
  const int workers = values.size() < (1u << 16) ? 1 : std::max(1, n_threads);
  std::vector<std::vector<uint64_t>> local(workers);
  std::vector<MagnitudeCount> counts(workers);
  parallel_ranges(values.size(), workers, [&](size_t begin, size_t end, int worker) {
    auto& own = local[worker];
    own.assign(kHistogramBins, 0);
    MagnitudeCount count;
    for (size_t i = begin; i < end; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(values[i]) & 0x7FFFFFFF;
      if (bits >= kInfinity) {
        ++count.non_finite;
        continue;
      }
      count.zeros += bits == 0;
      const uint32_t position = std::max(bits >> 13, kFirst) - kFirst;
      ++own[std::min<uint32_t>(position, kHistogramBins - 1)];
    }
    counts[worker] = count;
  });
  MagnitudeCount total;
  for (int w = 0; w < workers; ++w) {
    if (local[w].empty()) continue;
    for (int b = 0; b < kHistogramBins; ++b) bins[b] += local[w][b];
    total.zeros += counts[w].zeros;
    total.non_finite += counts[w].non_finite;
  }
  return total;
}

}  // namespace fallow
