// Runs a packed model: one token at a time (decode) or in blocks (prefill), with the neurons that a
// plan leaves idle skipped. Config and weights (packed.h) are borrowed; the run state is owned.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

#include "disk.h"
#include "kernels.h"
#include "packed.h"
#include "parallel.h"
#include "select.h"

namespace fallow {

// Places where a plan may set values to zero, in the order of the computation.
enum Tap {
  kQInput, kKInput, kVInput, kOInput, kGateInput, kUpInput,
  kGatePre, kGateAct, kUp, kInter, kDownInput, kFfnOut,
  // Not zero: scores up to which a row of gate_proj (of what a coarse one gives: how much its gate_act
  // may be off), up_proj (of gate_act) or down_proj_t (of inter) that is in planes is read coarse.
  // Fixed thresholds alone.
  kGateCoarse, kUpCoarse, kDownCoarse, kTaps,
};

// What the results of coarse rows are short of, on inputs like the calibration's: out^T (in x), a
// product of low rank.
struct Correction {
  size_t rank = 0;                 // 0: there is none
  std::vector<uint8_t> in;         // F16 (rank, hidden)
  std::vector<uint8_t> out;        // (rank, d_ff) of out_type, Q8_0 or F16
  uint32_t out_type = 0;

  uint64_t bytes() const { return in.size() + out.size(); }
};

// Values v_i of one layer and token with |v_i| * weight_i <= threshold become zero. The threshold
// is fixed, or that of the k largest scores, or that of a tail of tau^2 of the squared scores.
struct Cut {
  enum class By { kNothing, kThreshold, kTopk, kTail };
  By by = By::kNothing;
  double value = 0;            // the threshold, k as a share of the width, or tau
  std::vector<float> weight;   // empty: all ones
  std::vector<float> error;    // kGateCoarse: how much gate_pre of a coarse row is off
  Correction correction;       // kGateCoarse, kUpCoarse
};

using LayerCuts = std::array<Cut, kTaps>;

// Matrices of a layer's FFN that come through a Streamer, as one unit of it: the places in the model
// that say where they lie, and how far from the unit's beginning they do.
struct StreamedLayer {
  size_t unit = 0;
  std::vector<std::pair<const uint8_t**, uint64_t>> places;  // empty: the layer stays in memory
  bool only_rest = false;                                    // second planes alone
};

// Seconds spent since the last reset, by what they were spent on.
struct Timing {
  double attention_proj = 0, attention = 0, ffn = 0, select = 0, head = 0, other = 0;
  double disk = 0;  // waiting for it
};

class Engine {
 public:
  // Tokens of a block of prefill, enough to pay for unpacking the weights, and where memory is scarce:
  // the buffers of a 1.5B model then take 9 in place of 38 MB.
  static constexpr size_t kBlock = 256, kSmallBlock = 64;

  // `context` tokens of cache; the model must outlive the engine.
  Engine(const Packed& model, const Kernels& kernels, int n_threads, uint32_t context,
         size_t block = kBlock);

  // Empty: dense. Otherwise one entry per layer.
  void set_cuts(std::vector<LayerCuts> cuts);

  // Logits farther than this below the largest may come from lm_head_coarse, as may all but the
  // `most` largest; 0 nats: all are exact, 0 logits: no limit. The margin stays 0 where the model has
  // no lm_head_coarse.
  void set_shortlist(float nats, size_t most);

  // From now on rows of embed_tokens, or of lm_head, come from there.
  void set_embedding(FileRows* rows) { embedding_ = rows; }
  void set_head(FileRows* rows) { head_rows_ = rows; }

  // From now on these layers' matrices come from the disk; one entry per layer.
  void set_stream(Streamer* streamer, std::vector<StreamedLayer> layers);

  // Tokens that go through the model together as one by one would, to the bit, in less time.
  static constexpr size_t kFew = 8;

  // Called between layers, and between parts of a block's head. May throw, which ends the pass.
  void set_pause(std::function<void()> pause) { pause_ = std::move(pause); }

  // Reads n tokens as those that follow the first `position` that the cache holds, and forgets what it
  // held after these. logits (n, vocab) if `all`, else those of the last token; `dense`: without cuts
  // and head margin. The caller checks ids, and that position <= held() and position + n <= context().
  // After an exception the cache holds at least `position` tokens.
  void forward(const int32_t* tokens, size_t n, uint32_t position, bool all, bool dense,
               float* logits);

  uint32_t held() const { return position_; }  // tokens in the cache
  uint32_t context() const { return context_; }

  // Since the last reset_stats: tokens read; neurons with a non-zero inter per layer, summed over
  // them; and bytes of weights and cache read by those that came one by one.
  uint64_t tokens() const { return tokens_; }
  const std::vector<uint64_t>& active() const { return active_; }
  uint64_t bytes_read() const { return bytes_read_; }
  const Timing& timing() const { return timing_; }
  void reset_stats();

 private:
  // A block of tokens on its way into a product, (T, width): float, bfloat16 if prefill uses it,
  // and the integers of at most kFew.
  struct Input {
    size_t width = 0;
    std::vector<float> x, d, sum, sum16;
    std::vector<int8_t> high, low;
    std::vector<uint16_t> half;
    Input(size_t tokens, size_t width);
    Activation activation(size_t token = 0) const;
  };
  struct Product {  // y (T, rows) = x W^T + bias
    const Matrix& w;
    const float* bias;
    float* y;
    Tap input;
    size_t stride = 0;  // from token to token; 0: rows

    size_t step() const { return stride > 0 ? stride : w.rows; }
  };

  bool is_dense() const { return cuts_.empty() || dense_; }
  // Whether n tokens take the products of decode; otherwise they are a block of prefill.
  static bool as_decode(size_t n) { return n <= kFew; }
  bool has_shortlist() const { return margin_ > 0 && !dense_; }
  void block(const int32_t* tokens, size_t n);
  void embed(const int32_t* tokens, size_t n);
  void attention(size_t layer, size_t n);
  void attend(size_t layer, size_t n);
  void attend_heads(size_t layer, Share heads, Share tokens, int worker);
  size_t first_position(size_t layer, size_t t) const;
  uint16_t* keys(size_t layer, size_t kv_head, size_t panel);
  uint16_t* values(size_t layer, size_t kv_head, size_t panel);
  void rotate(const Layer& layer, const Norm& norm, size_t heads, size_t n, float* x);
  void store_cache(size_t layer, size_t n);
  void ffn(size_t layer, size_t n);
  bool reads_streamed(size_t layer, size_t n) const;
  void fetch(size_t layer);
  bool gate_is_coarse(size_t l) const;
  void gate_from_planes(size_t l, const Activation& x, Share range, int worker);
  const float* corrected(const Correction& correction, const float* x, Share range, int worker);
  void correct(const Correction& correction, size_t n, const Input& input);
  void activate_coarse(const Cut& cut, size_t begin, size_t n, float* values, float* scores,
                       int worker);
  void ffn_token(size_t layer, Input& input);
  void ffn_one(size_t layer, const Input& input);
  void ffn_few(size_t layer, size_t n, const Input& input);
  static size_t keep_above(const Cut& cut, float* values, Share range, int32_t* rows);
  const uint8_t* row_part(const Matrix& w, size_t row, size_t column, size_t n,
                          uint8_t* scratch) const;
  template <class Use>
  void for_rows(const Matrix& w, const int32_t* rows, size_t begin, size_t n, int worker,
                const Use& use);
  void gemv(const Matrix& w, const int32_t* rows, size_t begin, size_t n, const Activation& x,
            float* y, int worker);
  void axpy(const Matrix& w, const int32_t* rows, size_t begin, size_t n, const float* coefficient,
            float* y, int worker);
  void gemv_tokens(const Matrix& w, size_t begin, size_t n, const Input& input, size_t tokens,
                   float* y, size_t stride, int worker);
  void axpy_tokens(const Matrix& w, size_t begin, size_t n, const float* coefficient, size_t from,
                   size_t tokens, float* y, size_t stride, int worker);
  void ffn_sparse_one(size_t layer, Input& input);
  void ffn_block(size_t layer, size_t n, Input& input);
  void down_block(const Matrix& w, size_t n, const float* inter, bool add);
  template <class InterOf>
  void add_outliers(const Layer& layer, const InterOf& inter_of, float* y, int worker);
  void sum_partials(size_t n);
  void add_branch(const Norm& post_norm, size_t n);
  void head(size_t n, bool all, float* logits);
  float lowest_exact(const float* logits, std::vector<float>& near) const;
  void complete_head(size_t n, float* logits);
  void complete_head_token(size_t t, float lowest, float* logits);
  template <class Use>
  void for_head(size_t n, const Use& use);

  void normalize(const Norm& norm, const float* x, size_t width, float* y) const;
  void normalize_into(const Norm& norm, size_t n, Input& input);
  void prepare(Input& input, size_t n);
  void project(size_t layer, Input& input, size_t n, std::initializer_list<Product> products);
  void multiply(const Input& input, size_t n, const Product* begin, const Product* end);
  void multiply_block(const Input& input, size_t n, const Product& product, int worker);
  void multiply_panel(const Input& input, size_t n, const Matrix& w, size_t row, size_t rows,
                      float* y, size_t stride, int worker);
  bool uses_bf16(const Matrix& w, size_t k) const;
  void activate(float* x, size_t n) const;
  const Cut& cut(size_t layer, Tap tap) const;
  bool has_cut(size_t layer, std::initializer_list<Tap> taps) const;
  void apply(const Cut& cut, float* x, size_t width, int worker);
  void collect_rows(const float* values);
  template <class Body>
  void for_tokens(size_t n, const Body& body);

  const Packed& model_;
  const Config& config_;
  const Kernels& kernels_;
  ThreadPool pool_;
  uint32_t context_, position_ = 0;
  size_t block_;  // tokens per block of prefill
  std::vector<LayerCuts> cuts_;
  FileRows *embedding_ = nullptr, *head_rows_ = nullptr;
  Streamer* streamer_ = nullptr;
  std::vector<StreamedLayer> streamed_;
  std::function<void()> pause_ = [] {};
  float margin_ = 0;
  size_t most_exact_ = 0;
  bool dense_ = false;  // this forward() leaves cuts and margin alone

  Input attn_input_, o_input_, ffn_input_, cut_input_, token_input_;
  // (block, ...)
  std::vector<float> residual_, q_, k_, v_, branch_, gate_, up_, cos_, sin_;
  std::vector<float> coarse_;      // (block, d_ff), for plans that read rows coarse
  std::vector<uint16_t> inter_half_;
  const float* turned_ = nullptr;  // whose angles cos_ and sin_ hold for this block
  std::vector<float> partial_;     // (threads, kFew, hidden): threads' sums of down_proj_t rows
  std::vector<int32_t> rows_;      // neurons that are not zero, ascending
  size_t n_rows_ = 0;
  std::vector<int32_t> slots_;     // of rows that come from a file
  // f16 (layers, kv_heads, panels of positions, head_dim, kPanel) and (layers, kv_heads, panels of
  // columns, context, kPanel), as the batched products take them.
  std::vector<uint16_t> k_cache_, v_cache_;

  struct Worker {
    RowSelector selector;
    uint64_t active = 0;            // neurons of this block or token
    uint64_t bytes = 0;             // of rows read for this token
    std::vector<int32_t> fine, coarse;  // neurons whose rows are read whole or coarse
    std::vector<uint8_t> joined;    // some rows whose planes were joined
    std::vector<float> outliers;    // their inter
    std::vector<float> magnitudes;  // that a cut looks at
    std::vector<float> short_of;    // coarse results, after `rank` factors
    std::vector<float> lower;       // gate_act if a coarse row's gate_pre were too large
    std::vector<float> scores, sums;  // attention
    std::vector<float> rows, panel;  // weights, keys or values as float
    std::vector<uint16_t> panel_half, half;
    std::vector<int32_t> candidates;  // of the head
    std::vector<float> exact;         // their logits, or those of a panel
  };
  std::vector<Worker> workers_;

  uint64_t tokens_ = 0, bytes_read_ = 0;
  std::vector<uint64_t> active_;
  Timing timing_;
};

}  // namespace fallow
