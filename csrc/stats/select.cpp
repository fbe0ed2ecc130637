#include "stats/select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "kernels/kernels.h"
#include "parallel.h"

namespace fallow {
namespace {

// Scores fall into bins by their exponent and top 4 mantissa bits, which order like the scores
// themselves. One pass finds the bin in which the answer lies, and only that bin is sorted out.
constexpr int kShift = 19;
constexpr size_t kBins = 1u << (31 - kShift);
constexpr size_t kFirstNonFinite = 0x7F800000u >> kShift;

size_t bin_of(float score) { return (std::bit_cast<uint32_t>(score) & 0x7FFFFFFFu) >> kShift; }

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

double mass_of(float v, Mass mass) { return mass == Mass::kSquare ? static_cast<double>(v) * v : v; }

}  // namespace

RowSelector::RowSelector(size_t width) : counts_(kBins), masses_(kBins) {
  inside_.reserve(width);
}

float RowSelector::tail(const float* row, size_t width, double share, Mass mass) {
  if (!count(row, width)) return kNan;
  masses_.assign(kBins, 0.0);
  for (size_t i = 0; i < width; ++i) masses_[bin_of(row[i])] += mass_of(row[i], mass);
  double budget = 0;
  for (double sum : masses_) budget += sum;
  budget *= share;

  double spent = 0;
  size_t bin = 0;
  while (bin < kBins && spent + masses_[bin] <= budget) spent += masses_[bin++];
  float threshold = gather(row, width, bin);
  std::sort(inside_.begin(), inside_.end());
  for (size_t i = 0, end; i < inside_.size(); i = end) {  // equal scores fit together or not
    for (end = i; end < inside_.size() && inside_[end] == inside_[i]; ++end)
      spent += mass_of(inside_[end], mass);
    if (spent > budget) break;
    threshold = inside_[i];
  }
  return threshold;
}

// Fills counts_. False for a row with NaN or infinity, whose threshold becomes NaN: nothing is
// <= NaN, so the row stays whole and reaches the check on the model's output.
bool RowSelector::count(const float* row, size_t width) {
  counts_.assign(kBins, 0);
  for (size_t i = 0; i < width; ++i) ++counts_[bin_of(row[i])];
  return std::all_of(counts_.begin() + kFirstNonFinite, counts_.end(),
                     [](uint32_t n) { return n == 0; });
}

// Fills inside_ with the scores in the bin; returns the largest score below it, 0 if none.
float RowSelector::gather(const float* row, size_t width, size_t bin) {
  inside_.clear();
  float below = 0.0f;
  for (size_t i = 0; i < width; ++i) {
    const size_t own = bin_of(row[i]);
    if (own == bin) inside_.push_back(row[i]);
    if (own < bin) below = std::max(below, row[i]);
  }
  return below;
}

namespace {

bool all_finite(const float* row, uint64_t width) {
  return std::all_of(row, row + width, [](float v) { return std::isfinite(v); });
}

}  // namespace

void topk_thresholds(const float* scores, uint64_t rows, uint64_t width, uint64_t k,
                     float* thresholds, int n_threads) {
  const Kernels& kernels = *usable_kernels().front();
  parallel_ranges(rows, n_threads, [&](size_t begin, size_t end, int) {
    for (size_t r = begin; r < end; ++r) {
      const float* row = scores + r * width;
      thresholds[r] = all_finite(row, width) ? kernels.topk_threshold(row, width, k) : kNan;
    }
  });
}

void tail_thresholds(const float* scores, uint64_t rows, uint64_t width, double share, Mass mass,
                     float* thresholds, int n_threads) {
  parallel_ranges(rows, n_threads, [&](size_t begin, size_t end, int) {
    RowSelector selector(width);
    for (size_t r = begin; r < end; ++r)
      thresholds[r] = selector.tail(scores + r * width, width, share, mass);
  });
}

}  // namespace fallow
