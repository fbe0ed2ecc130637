// Inputs that each layer has of its own, beside the residual stream (Gemma 4's per-layer embeddings). Of a
// token's embedding x, its row e of embed_tokens_per_layer, and the layers' shares p_l and e_l of
// W_model x and e, of d values each:
//
//   input_l = (norm(p_l / sqrt(hidden)) + e_l sqrt(d)) / sqrt(2)
//   out_l   = W_proj (act(W_gate h) * input_l)       of the residual h after the layer's FFN
#pragma once

#include <vector>

#include "engine/packed.h"
#include "engine/products.h"
#include "engine/runtime.h"

namespace fallow {

class PerLayerInputs {
 public:
  // `tokens` of a block.
  PerLayerInputs(Runtime& run, Products& products, const Packed& model, size_t tokens);

  // Begins with what n tokens' embeddings x (T, hidden) make of it; add_row() is then to be called for each.
  void begin(const Input& x, size_t n);
  // `row`: a token's of embed_tokens_per_layer.
  void add_row(size_t token, const uint8_t* row);
  // out (T, hidden) of a layer, of x (T, hidden).
  void forward(size_t layer, const Input& x, size_t n, float* out);

 private:
  Runtime& run_;
  Products& products_;
  const Packed& model_;
  const size_t width_, all_;   // of one layer's input, and of all layers'
  std::vector<float> inputs_;  // (block, layers, width)
  std::vector<float> row_;     // (layers * width,)
  Input gated_;                // (block, width)
};

}  // namespace fallow
