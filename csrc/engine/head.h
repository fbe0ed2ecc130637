// The language-model head: logits of hidden states, all exact or, by a plan's shortlist, those that a
// coarse copy of the head puts near the largest.
#pragma once

#include <vector>

#include "engine/disk.h"
#include "engine/packed.h"
#include "engine/products.h"

namespace fallow {

class Head {
 public:
  Head(Runtime& run, Products& products, const Packed& model)
      : run_(run), products_(products), model_(model), scratch_(run.n_threads()) {}

  // Logits farther than this below the largest may come from lm_head_coarse, as may all but the `most`
  // largest; 0 nats: all are exact, 0 logits: no limit. The margin stays 0 where the model has no
  // lm_head_coarse.
  void set_shortlist(float nats, size_t most);
  bool has_shortlist() const { return margin_ > 0; }
  // From now on rows of the head come from there.
  void set_rows(FileRows* rows) { rows_ = rows; }

  // logits (n, vocab) of normed hidden states; `exact`: without the shortlist.
  void logits(const Input& hidden, size_t n, bool exact, float* logits);

 private:
  struct Scratch {
    std::vector<int32_t> candidates;
    std::vector<float> exact;  // their logits, or those of a panel
  };

  template <class Use>
  void for_parts(size_t n, const Use& use);
  float lowest_exact(const float* logits, std::vector<float>& near) const;
  void complete(const Input& hidden, size_t n, float* logits);
  void complete_token(const Activation& hidden, float lowest, float* logits);
  float bias(size_t row) const { return model_.lm_head_bias ? model_.lm_head_bias[row] : 0.0f; }

  Runtime& run_;
  Products& products_;
  const Packed& model_;
  FileRows* rows_ = nullptr;
  float margin_ = 0;
  size_t most_exact_ = 0;
  std::vector<int32_t> slots_;    // of rows that come from a file
  std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace fallow
