// Per-token thresholds. A neuron is inactive iff its score is <= the threshold of its token, so ties
// at the threshold are all inactive; this is the one place where ties are decided.
#pragma once

#include <cstdint>

namespace fallow {

// scores (rows, width), all >= 0, row-major -> thresholds (rows,).

// Keeps the k largest scores of each row: threshold = the (width - k)-th smallest; 0 if k >= width.
void topk_thresholds(const float* scores, uint64_t rows, uint64_t width, uint64_t k,
                     float* thresholds, int n_threads);

// Largest score t of each row with sum of score^2 over {score <= t} <= tau^2 * sum of score^2;
// 0 if there is none.
void tail_thresholds(const float* scores, uint64_t rows, uint64_t width, double tau,
                     float* thresholds, int n_threads);

}  // namespace fallow
