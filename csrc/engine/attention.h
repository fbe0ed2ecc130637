// Attention with rotary embeddings, grouped queries and sliding windows.
#pragma once

#include <deque>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/packed.h"
#include "engine/products.h"

namespace fallow {

// Where a token stands: at which position of which slot's sequence.
struct Place {
  size_t slot, position;
};

class Attention {
 public:
  // `tokens` of a block; `slots` sequences of at most `context` tokens.
  Attention(Runtime& run, Products& products, const Packed& model, size_t tokens, size_t context,
            size_t slots);

  // The next tokens stand there: those of a block in one slot, in a row; those of decode in any, each slot's
  // in a row. The places are borrowed until the next call.
  void begin(const Place* places);
  // out (T, hidden) = softmax(q k^T) v W_o^T with q, k, v = x W^T; keeps the tokens' keys and values.
  void attend(size_t layer, const Input& x, size_t n, float* out);

 private:
  // Of each thread. A token's heads, mixed over some of its positions, wait for the others' parts: of row
  // (token, head) the largest score, the sum of numerators and their sum of values.
  struct Scratch {
    std::vector<float> scores, panel, largest, sums, mixed;
  };

  void keep(size_t layer, size_t n);
  void rotate(const Layer& layer, const Norm& norm, size_t heads, size_t n, float* x);
  void mix(size_t layer, size_t n);
  void mix_heads(size_t layer, Share heads, Share tokens, int worker);
  void mix_part(size_t layer, size_t token, int worker);
  void merge_parts(size_t layer, size_t n);
  void sum_values(size_t layer, Share heads, Share tokens, Share positions, float* largest, float* sums,
                  float* mixed, int worker);
  size_t positions_read(size_t layer, size_t n) const;
  size_t first_position(size_t layer, size_t t) const;
  size_t end_position(size_t t) const { return places_[t].position + 1; }

  Runtime& run_;
  Products& products_;
  const Packed& model_;
  const Config& config_;
  std::deque<KvCache> caches_;     // of each slot; they do not move
  const Place* places_ = nullptr;  // of each token
  std::vector<float> q_, k_, v_;   // (block, heads * head_dim)
  std::vector<float> cos_, sin_;   // (block, rotary_dim / 2), of the layer's
  const float* turned_ = nullptr;  // the frequencies whose angles cos_ and sin_ hold
  Input mixed_;                    // softmax(q k^T) v, (block, heads * head_dim)
  std::vector<Scratch> scratch_;   // of each thread
};

}  // namespace fallow
