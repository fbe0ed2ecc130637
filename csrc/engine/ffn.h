// The feed-forward block: inter = act(x W_gate^T) * (x W_up^T), out = inter W_down^T, a sum of rows of
// down_proj_t. ffn.cpp is the dense one; ffn_sparse.cpp leaves out what a plan lets it.
#pragma once

#include <vector>

#include "engine/cuts.h"
#include "engine/packed.h"
#include "engine/products.h"
#include "engine/runtime.h"

namespace fallow {

class Ffn {
 public:
  // `tokens` of a block.
  Ffn(Runtime& run, Cuts& cuts, Products& products, const Packed& model, size_t tokens);

  // Whether decode reads of the layer's gate only the rows that its coarse copy predicts: where zeros are
  // skipped and no cut needs other values.
  bool predicts(size_t layer) const {
    return cuts_.skips_zeros() && model_.layers[layer].gate_coarse.data && chooses_apart(layer);
  }
  // out (T, hidden) = FFN(x) of a layer. Changes nothing of x but what its products need.
  void forward(size_t layer, const Input& x, size_t n, float* out);

 private:
  struct Scratch {
    std::vector<float> coefficients;  // inter of listed neurons
    std::vector<float> outliers;      // inter of outlier neurons
    uint64_t active = 0, predicted = 0;
  };

  // Dense.
  void dense(size_t layer, const Input& x, size_t n, float* out);
  void block(size_t layer, const Input& x, size_t n, float* out);
  void gate(const Layer& layer, const Input& x, size_t n, Share neurons, int worker);
  void up(const Layer& layer, const Input& x, size_t n, Share neurons, int worker);
  void down(const Layer& layer, size_t n, Share neurons, int worker);

  // Sparse: one token under a plan.
  bool chooses_apart(size_t layer) const;
  void sparse(size_t layer, const Input& x, float* out);
  void sparse_apart(size_t layer, const Input& x, float* out);
  void sparse_together(size_t layer, const Input& x, float* out);
  Neurons choose(const Cut& cut, Neurons among, Share range);
  void list_active_of(bool some);
  void gate_of(size_t layer, const Input& x, Share range, int worker);
  void up_of(const Layer& layer, const Activation& x, Neurons neurons, int worker);
  void whole_up_of(const Layer& layer, const Activation& x, Neurons neurons, int worker);
  void read_up(const Layer& layer, const Activation& x, Neurons neurons, float* up, int worker);
  void down_of(const Layer& layer, Neurons neurons, int worker);

  void activate(float* values, size_t n) const;
  void rectify_up(float* values, size_t n) const;  // if the model does
  void norm_inter(const Layer& layer, float* inter) const;  // of one token, if the layer does
  float* partial(int worker) { return partial_.data() + static_cast<size_t>(worker) * kFew * hidden_; }
  void sum_partials(size_t n, float* out) const;
  void add_outliers(const Layer& layer, size_t token, float* out, int worker);
  void add_counts(size_t layer);  // of the threads, to the statistics

  Runtime& run_;
  Cuts& cuts_;
  Products& products_;
  const Packed& model_;
  const Config& config_;
  const size_t hidden_;
  size_t d_ff_;                 // of the layer that is computed
  std::vector<float> inter_;    // (block, d_ff), with room for the widest layer: gate_pre, then gate_act, then inter
  std::vector<float> up_;       // (block, d_ff), or the values of listed neurons side by side
  std::vector<float> partial_;  // (threads, kFew, hidden): threads' sums of down_proj_t rows
  std::vector<int32_t> active_;  // neurons that are not zero, ascending, as they become known
  size_t n_active_ = 0;
  Input token_;                  // one token of several that a plan treats apart
  Input cut_input_;              // up_proj's, where a plan cuts it
  std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace fallow
