// Runs a packed model: at most kFew tokens at a time (decode) or in blocks (prefill), with the neurons
// that a plan leaves inactive skipped. Config and weights (packed.h) are borrowed; the run state is
// owned. The forward pass is a sequence of steps on the objects that it holds; each has its own file.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "engine/attention.h"
#include "engine/cuts.h"
#include "engine/disk.h"
#include "engine/experts.h"
#include "engine/ffn.h"
#include "engine/head.h"
#include "engine/packed.h"
#include "engine/per_layer_inputs.h"
#include "engine/products.h"
#include "engine/runtime.h"

namespace fallow {

class Engine {
 public:
  // Tokens of a block of prefill, enough to pay for unpacking the weights, and where memory is scarce: the
  // buffers, some 40 MB of a 1.5B model, then take a fourth.
  static constexpr size_t kBlock = 256, kSmallBlock = 64;

  // `slots` sequences, each with a cache of `context` tokens; the model must outlive the engine.
  Engine(const Packed& model, const Kernels& kernels, int n_threads, uint32_t context,
         size_t block = kBlock, size_t slots = 1);

  // Empty: dense. Otherwise one entry per layer.
  void set_cuts(std::vector<LayerCuts> cuts) {
    cuts_.set(std::move(cuts));
    cuts_.leave_aside(false);
  }
  // Neurons that a ReLU makes zero are left out, whatever the plan.
  void set_skips_zeros(bool skips) {
    cuts_.set_skips_zeros(skips && config_.has_zeros(), skips && config_.rectifies_up);
  }
  // Whether the layer's gate is read for those neurons alone that its coarse copy predicts.
  bool predicts(size_t layer) const { return ffn_.predicts(layer); }
  bool leaves_out_neurons(size_t layer) const { return cuts_.leaves_out_neurons(layer); }
  bool chooses_by_gate(size_t layer) const { return cuts_.chooses_by_gate(layer); }
  void set_shortlist(float nats, size_t most) { head_.set_shortlist(nats, most); }  // see Head
  bool has_shortlist() const { return head_.has_shortlist(); }
  // From now on rows of embed_tokens, of lm_head, or of embed_tokens_per_layer come from there.
  void set_embedding(FileRows* rows) { embedding_rows_ = rows; }
  void set_head(FileRows* rows) { head_.set_rows(rows); }
  void set_embedding_per_layer(FileRows* rows) { per_layer_rows_ = rows; }
  void set_experts(ExpertCache* cache) { experts_.set_cache(cache); }
  // From now on these layers' matrices come from the disk; one entry per layer.
  void set_stream(Streamer* streamer, std::vector<StreamedLayer> layers);
  // Called between layers, and between parts of a block's head. May throw, which ends the pass.
  void set_pause(std::function<void()> pause) { run_.pause = std::move(pause); }

  // Reads n tokens as those that follow the first `position` that the slot holds, and forgets what it
  // held after these. logits (n, vocab) if `all`, else those of the last token; `dense`: without cuts
  // and head margin; `exact`: a block's products are as near to those of single tokens as there are, not
  // as fast; `record`: active_neurons() then tells what the last tokens used. The caller checks ids, and
  // that position <= held(slot) and position + n <= context(). After an exception the slot holds at least
  // `position` tokens.
  void forward(const int32_t* tokens, size_t n, size_t slot, uint32_t position, bool all, bool dense,
               bool exact, bool record, float* logits);
  // Reads n tokens as forward() does, and gives what the head reads of each of them, the hidden states after
  // the last norm: hidden (n, hidden_size).
  void hidden_states(const int32_t* tokens, size_t n, size_t slot, uint32_t position, float* hidden);
  // Reads one token of each of n slots, at most most_together(), with the weights read once for all.
  // places[t] of token t: another slot each, and a position as for forward(). logits (n, vocab): to the bit
  // those of forward(), token by token.
  void forward_together(const int32_t* tokens, const Place* places, size_t n, bool dense, bool record,
                        float* logits);

  size_t slots() const { return held_.size(); }
  uint32_t held(size_t slot) const { return held_[slot]; }  // tokens in its cache
  uint32_t context() const { return context_; }
  size_t most_together() const { return std::min(kFew, block_); }
  int threads() const { return run_.pool.size(); }
  const Statistics& statistics() const { return run_.statistics; }
  const ActiveNeurons& active_neurons() const { return run_.active_neurons; }
  void reset_stats() { run_.statistics.reset(); }

 private:
  void begin_pass(bool dense, bool exact);
  template <class Use>
  void blocks(const int32_t* tokens, size_t n, size_t slot, uint32_t position, bool record, const Use& use);
  void block(const int32_t* tokens, const Place* places, size_t n);
  void embed(const int32_t* tokens, const Place* places, size_t n);
  template <class Use>
  void rows_of(const Matrix& table, FileRows* rows, const int32_t* tokens, size_t n, const Use& use);
  void ffn(size_t layer, size_t n);
  void norm(const Norm& norm, size_t n, Input& input);
  void add_branch(const Norm& post_norm, size_t n);
  void end_layer(size_t layer, size_t n);
  void head(size_t n, bool all, bool dense, float* logits);

  const Packed& model_;
  const Config& config_;
  uint32_t context_;
  size_t block_;  // tokens per block of prefill
  std::vector<uint32_t> held_;  // tokens in each slot's cache
  std::vector<Place> places_;   // of a block's tokens
  Runtime run_;
  Cuts cuts_;
  Products products_;
  Attention attention_;
  Ffn ffn_;
  Experts experts_;  // in place of the FFN, where there are any
  PerLayerInputs per_layer_inputs_;
  Head head_;
  Input normed_;                          // (block, hidden), what attention, FFN or head read
  std::vector<float> residual_, branch_;  // (block, hidden)
  FileRows *embedding_rows_ = nullptr, *per_layer_rows_ = nullptr;
  std::vector<int32_t> row_slots_;        // of rows that come from a file
  std::vector<uint8_t> embedding_row_;    // one that was in a tile
  Streamer* streamer_ = nullptr;
  std::vector<StreamedLayer> streamed_;
};

}  // namespace fallow
