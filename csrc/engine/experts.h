// A mixture of experts in place of a layer's FFN: out = sum over a token's experts of share * FFN(x). The
// router says which they are and what their shares; an expert that all tokens share comes on top.
// experts.cpp computes experts whole; experts_sparse.cpp leaves out of them what a plan lets it.
#pragma once

#include <utility>
#include <vector>

#include "engine/cuts.h"
#include "engine/disk.h"
#include "engine/packed.h"
#include "engine/products.h"
#include "engine/runtime.h"

namespace fallow {

class Experts {
 public:
  // `tokens` of a block.
  Experts(Runtime& run, Cuts& cuts, Products& products, const Packed& model, size_t tokens);

  // From now on experts come from there, but for the shared one.
  void set_cache(ExpertCache* cache) { cache_ = cache; }

  // out (T, hidden) = the sum of a layer's experts for x (T, hidden).
  void forward(size_t layer, const Input& x, size_t n, float* out);

 private:
  // Tokens that chose an expert are places [begin, end), of all tokens and experts of a block, by expert
  // and then by token.
  struct Group {
    size_t expert, begin, end;
    size_t size() const { return end - begin; }
  };

  struct Scratch {
    std::vector<float> coefficients;  // up or inter of listed neurons
    uint64_t active = 0;
  };

  void route(size_t layer, const Input& x, size_t n);
  void choose(size_t layer, float* p, size_t* experts, float* shares, int worker);
  void share_out(size_t n);
  void record(size_t layer, size_t n);
  void few(size_t layer, const Input& x, size_t n, float* out);
  void run_few(const Expert& e, const Activation* tokens, size_t n, size_t place, int worker);
  void gate_and_up(const Expert& e, const Activation* tokens, size_t n, size_t place, int worker);
  void down(const Expert& e, size_t n, size_t place, int worker);
  void block(size_t layer, const Input& x, size_t n, float* out);
  void whole_group(size_t layer, const Expert& e, const Input& x, Group group, float* out);
  void few_at_once(size_t layer, const Expert& e, const Input& x, Group group, float* out);

  // Sparse: neurons of the experts that the router chose; the shared one is whole.
  bool cuts(size_t layer, Group group) const {
    return group.expert != n_experts_ && cuts_.leaves_out_neurons(layer);
  }
  bool chooses_apart(size_t layer) const;
  void masked(size_t layer, size_t expert, float* gate, float* up, int worker);
  void sparse(size_t layer, const Input& x, size_t first);
  void gate_of(const Expert& e, const Activation& x, size_t place, Share range, int worker);
  Neurons choose(size_t layer, Tap tap, size_t expert, size_t place, Neurons among, Share range);
  void choose_by_gate(size_t layer, size_t expert, size_t place, int worker);
  void choose_by_inter(size_t layer, size_t expert, size_t place, int worker);
  void up_of(const Expert& e, const Activation& x, size_t place, Neurons neurons, bool whole, int worker);
  void down_of(const Expert& e, size_t place, Neurons neurons, int worker);
  void add_counts(size_t layer);  // of the threads, to the statistics
  template <class Use>
  void for_parts(size_t layer, const Use& use);
  void order(size_t first, size_t last);
  void foresee(size_t layer, const Input& x, size_t n);
  const Expert* weights(size_t layer, Group group, size_t i, int worker, Expert& streamed);
  float* inter_of(size_t place) { return gate_.data() + place * config_.widest_ffn(); }
  float* up_values(size_t place) { return up_.data() + place * config_.widest_ffn(); }
  int32_t* active_of(size_t place) { return active_.data() + place * config_.intermediate_size; }
  float* partial(int worker, size_t place) {
    return partial_.data() + (static_cast<size_t>(worker) * few_places_ + place) * hidden_;
  }

  Runtime& run_;
  Cuts& cuts_;
  Products& products_;
  const Packed& model_;
  const Config& config_;
  const size_t hidden_, n_experts_, n_used_;
  const size_t per_token_;   // places of a token: its experts, and the shared one
  const size_t few_places_;  // of kFew tokens
  const bool are_groups_small_;
  std::vector<float> logits_;      // (block, n_experts), then probabilities
  std::vector<size_t> experts_;    // (block, n_used): of each token, likeliest first
  std::vector<float> shares_;      // (block, per_token); 0: it is left out
  std::vector<size_t> place_of_;   // (block, per_token)
  std::vector<size_t> token_in_;   // of each place
  std::vector<float> share_in_;    // of each place
  std::vector<Group> groups_;      // ascending, the shared expert last
  std::vector<size_t> ends_;       // of each expert
  std::vector<size_t> wanted_, uses_;
  std::vector<float> ahead_logits_, ahead_shares_;  // of few tokens, for the layer after
  std::vector<size_t> ahead_experts_, ahead_;
  std::vector<size_t> order_;      // of groups: what is in memory before what is read meanwhile
  std::vector<float> gate_, up_;   // (places or block, d_ff)
  std::vector<int32_t> active_;    // (few_places, d_ff): neurons that are not zero, ascending
  std::vector<size_t> n_active_;   // of few places
  std::vector<std::pair<size_t, size_t>> cut_places_;  // of few tokens: place, expert
  std::vector<Scratch> scratch_;   // of each thread
  std::vector<float> partial_;     // (threads, few_places, hidden): threads' sums of down_proj_t rows
  std::vector<float> y_;           // (block, hidden)
  Input group_, part_;             // tokens of a block that chose an expert, and at most kFew of them
  ExpertCache* cache_ = nullptr;
};

}  // namespace fallow
