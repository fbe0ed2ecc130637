#include "select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.h"

namespace fallow {
namespace {

// std::nth_element needs an ordering, which NaN does not have. A row with one gets the threshold
// NaN: nothing is <= NaN, so the row stays whole and the NaN reaches the check on the model's output.
bool all_finite(const std::vector<float>& row) {
  return std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); });
}

float topk_threshold(std::vector<float>& row, uint64_t k) {
  if (k >= row.size()) return 0.0f;
  const auto nth = row.begin() + static_cast<std::ptrdiff_t>(row.size() - k - 1);
  std::nth_element(row.begin(), nth, row.end());
  return *nth;
}

float tail_threshold(std::vector<float>& row, double tau) {
  double total = 0;
  for (float v : row) total += static_cast<double>(v) * v;
  const double budget = tau * tau * total;

  // Weighted selection in O(width): row[0, low) is known to fit the budget, row[high, ...) not to.
  size_t low = 0, high = row.size();
  double spent = 0;
  while (low < high) {
    const size_t middle = low + (high - low) / 2;
    std::nth_element(row.begin() + low, row.begin() + middle, row.begin() + high);
    double cost = 0;
    for (size_t i = low; i <= middle; ++i) cost += static_cast<double>(row[i]) * row[i];
    if (spent + cost <= budget) {
      spent += cost;
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0) return 0.0f;
  const auto fits = row.begin() + static_cast<std::ptrdiff_t>(low);
  const float threshold = *std::max_element(row.begin(), fits);
  if (fits == row.end() || *std::min_element(fits, row.end()) > threshold) return threshold;
  // The budget ends inside a run of equal scores, and dropping the whole run would exceed it.
  float below = 0.0f;
  for (auto it = row.begin(); it != fits; ++it)
    if (*it < threshold) below = std::max(below, *it);
  return below;
}

template <class Select>
void per_row(const float* scores, uint64_t rows, uint64_t width, float* thresholds, int n_threads,
             Select select) {
  parallel_ranges(rows, n_threads, [&](size_t begin, size_t end, int) {
    std::vector<float> row(width);
    for (size_t r = begin; r < end; ++r) {
      row.assign(scores + r * width, scores + (r + 1) * width);
      thresholds[r] =
          all_finite(row) ? select(row) : std::numeric_limits<float>::quiet_NaN();
    }
  });
}

}  // namespace

void topk_thresholds(const float* scores, uint64_t rows, uint64_t width, uint64_t k,
                     float* thresholds, int n_threads) {
  per_row(scores, rows, width, thresholds, n_threads,
          [k](std::vector<float>& row) { return topk_threshold(row, k); });
}

void tail_thresholds(const float* scores, uint64_t rows, uint64_t width, double tau,
                     float* thresholds, int n_threads) {
  per_row(scores, rows, width, thresholds, n_threads,
          [tau](std::vector<float>& row) { return tail_threshold(row, tau); });
}

}  // namespace fallow
