// Per-token thresholds. A neuron is inactive iff its score is <= the threshold of its token, so ties
// at the threshold are all inactive; this is the one place where ties are decided.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fallow {

// What of a score a tail's budget counts: its square, or itself.
enum class Mass { kSquare, kScore };

// Finds the tail threshold of one token; keeps its scratch memory from one to the next.
class RowSelector {
 public:
  explicit RowSelector(size_t width = 0);

  // Largest score whose tail stays within `share` of the row's mass; 0 if there is none.
  float tail(const float* row, size_t width, double share, Mass mass);

 private:
  bool count(const float* row, size_t width);
  float gather(const float* row, size_t width, size_t bin);

  std::vector<uint32_t> counts_;
  std::vector<double> masses_;
  std::vector<float> inside_;
};

// scores (rows, width), all >= 0, row-major -> thresholds (rows,).

// Keeps the k largest scores of each row: threshold = the (width - k)-th smallest; 0 if k >= width.
void topk_thresholds(const float* scores, uint64_t rows, uint64_t width, uint64_t k,
                     float* thresholds, int n_threads);

// Largest score t of each row such that the scores up to t have at most `share` of the row's mass;
// 0 if there is none.
void tail_thresholds(const float* scores, uint64_t rows, uint64_t width, double share, Mass mass,
                     float* thresholds, int n_threads);

}  // namespace fallow
