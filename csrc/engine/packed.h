// A packed model: what the `fallow.*` metadata of the file says, and where its weights lie in the
// mapped bytes. docs/packed.md describes the file. Nothing is copied but names and small vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/cuts.h"
#include "engine/tiles.h"

namespace fallow {

struct PackedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Act { kSilu, kGeluTanh, kGelu, kRelu, kRelu2, kFatRelu, kSwigluOai };

struct Config {
  uint32_t hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, vocab_size;
  uint32_t context_length;
  uint32_t rotary_dim;        // leading dimensions of a head that turn; 0: no rotary embedding
  // intermediate_size, n_kv_heads, head_dim and rotary_dim are the largest of any layer (Layer).
  float attention_scale;      // of q . k
  float rope_scale;
  float embedding_scale;
  float residual_scale;       // of what attention and FFN add
  // Queries grow with their position p: times 1 + scale ln(1 + floor(p / length)); scale 0: they stay.
  float temperature_scale;
  uint32_t temperature_length;
  float attention_softcap;    // c: scores are c tanh(score / c); 0: as they are
  float logit_softcap;        // the same of logits
  float norm_eps;
  bool layer_norm;            // LayerNorm; otherwise RMSNorm
  bool gated;                 // gate_proj and up_proj; otherwise up_proj alone, which `act` follows
  bool parallel;              // attention and FFN read the same norm and add to the same residual
  Act act;
  float activation_threshold; // of kFatRelu, whose smaller values become zero
  bool rectifies_up;          // dReLU: what up_proj puts out passes a ReLU, too
  float swiglu_alpha, swiglu_limit;  // of kSwigluOai (engine/activation.h)
  // A mixture of experts in place of every FFN; intermediate_size is then that of an expert.
  uint32_t n_experts;         // 0: there are none
  uint32_t n_experts_used;    // by a token
  uint32_t shared_intermediate_size;  // of an expert that every token uses; 0: there is none
  bool norm_experts;          // shares of a token's experts are made to sum to 1
  uint32_t hidden_size_per_layer_input;  // of inputs that each layer has of its own; 0: there are none

  uint32_t widest_ffn() const { return std::max(intermediate_size, shared_intermediate_size); }
  // Of a layer of such a width, with all its experts.
  uint64_t neurons(uint32_t width) const {
    return uint64_t{std::max(1u, n_experts)} * width + shared_intermediate_size;
  }
  // Whether the activation makes neurons exactly zero.
  bool has_zeros() const { return act == Act::kRelu || act == Act::kRelu2 || act == Act::kFatRelu; }
};

// W (rows, cols), row-major in a ggml type or in two bits; data is null for a matrix the model does not
// have.
struct Matrix {
  const uint8_t* data = nullptr;
  uint32_t type = 0;
  uint64_t rows = 0, cols = 0;
  uint64_t row_bytes = 0;
  Layout layout = Layout::kRows;

  uint64_t bytes() const { return rows * row_bytes; }
};

struct Norm {
  const float* weight = nullptr;  // null: there is no such norm
  const float* bias = nullptr;
};

// One FFN of several.
struct Expert {
  Matrix gate_proj, up_proj, down_proj_t;  // (d_ff, hidden) each
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;  // (d_ff,), (d_ff,), (hidden,)
};

struct Layer {
  // Of attn_norm and ffn_norm the weight may be null, where what they read is not normed. Where both are
  // there and the config is parallel, both read what came into the layer.
  Norm attn_norm, attn_post_norm, ffn_norm, ffn_post_norm, q_norm, k_norm, v_norm;
  Norm attn_sub_norm, ffn_sub_norm;             // before o_proj and down_proj
  bool norms_heads = true;                      // q_norm and k_norm are of each head, not of all
  uint32_t intermediate_size = 0;               // d_ff; of a mixture that of an expert
  uint32_t n_kv_heads = 0, head_dim = 0, rotary_dim = 0;
  uint32_t kv_layer = 0;  // whose keys and values it reads: its own, or those of an earlier layer
  // (heads * head_dim or hidden, hidden or ...). Where keys and values are another layer's, k_proj and
  // v_proj are none; where v_proj alone is, values are what k_proj puts out.
  Matrix q_proj, k_proj, v_proj, o_proj;
  Matrix gate_proj, up_proj, down_proj_t;       // (d_ff, hidden) each
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
  const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
  // Predict which neurons a ReLU leaves: those for which the product with these two bits and the bias sum
  // to more than zero (docs/packed.md); null: there is no predictor.
  Matrix gate_coarse;                           // (d_ff, hidden)
  const float* gate_coarse_bias = nullptr;      // (d_ff,)
  // Neurons so loud that rounding their output weights would cost more than that of all others:
  // their rows are zero in down_proj_t and whole here.
  Matrix outliers;                              // (n, hidden)
  std::vector<uint32_t> outlier_neurons;        // (n,), ascending
  // (d_ff,): ||down_proj[:, i]|| of the source; of a mixture (n_experts, d_ff), or null in older files.
  const float* down_norm = nullptr;
  // In place of the FFN's: of a mixture of experts, the shared one last.
  Matrix router, shared_expert_gate;            // (n_experts, hidden), (1, hidden); F32
  const float* router_bias = nullptr;           // (n_experts,)
  std::vector<Expert> experts;
  // Of each head the logit of nothing at all: a score that its softmax divides by, without a value.
  const float* sinks = nullptr;                 // (heads,); null: there are none
  const float* inv_freq = nullptr;              // (rotary_dim / 2,)
  const float* rope_scale = nullptr;            // (1,), factor of cos and sin; null: the config's
  // Of inputs of each layer (per_layer_inputs.h).
  Matrix per_layer_input_gate;                  // (hidden_size_per_layer_input, hidden)
  Matrix per_layer_projection;                  // (hidden, hidden_size_per_layer_input)
  Norm post_per_layer_input_norm;
  const float* layer_scalar = nullptr;          // (1,), factor of what the layer puts out; null: 1
  uint32_t sliding_window = 0;                  // tokens; 0: all
};

struct Packed {
  Config config;
  std::vector<Layer> layers;
  Matrix embed_tokens;                  // (vocab, hidden)
  // Of inputs of each layer, with n = n_layers * hidden_size_per_layer_input.
  Matrix embed_tokens_per_layer;        // (vocab, n)
  Matrix per_layer_model_projection;    // (n, hidden)
  Norm per_layer_projection_norm;
  Matrix lm_head;                       // the same as embed_tokens where the head is tied
  Matrix lm_head_coarse;                // approximates lm_head in two bits; data may be null
  const float* lm_head_coarse_bias = nullptr;  // in place of lm_head_bias
  const float* embed_positions = nullptr;  // (context, hidden)
  const float* lm_head_bias = nullptr;
  Norm norm;

  // Of the values of a token at a tap; of a mixture's neurons those of all experts.
  size_t width_of(size_t layer, Tap tap) const;
};

// Reads the header of a packed model in data[0, size), which must outlive the result. Throws
// PackedError or GgufError naming what is wrong; every shape and type is checked here, so that
// the engine need not.
Packed read_packed(const uint8_t* data, uint64_t size);

// The FFNs of a model that another engine runs (csrc/ggml_plugin), for what they need beside that engine's
// own file.
struct FfnFile {
  // Of each layer's gate_proj, up_proj and down_proj as that file has them, three by three.
  std::vector<uint64_t> fingerprints;
  std::vector<Layer> layers;     // down_proj_t and outliers alone; of a packed model gate_proj, up_proj too
  std::vector<LayerCuts> cuts;   // one per layer, or none
  std::string note;              // what of it is left out there, for people; or none
};

// The same, of a file of `fallow llama pack`, or of a packed model that can stand in for one.
FfnFile read_ffn_file(const uint8_t* data, uint64_t size);

// Of n bytes, for telling models apart; no defence against anybody.
uint64_t fingerprint(const uint8_t* data, uint64_t n);

}  // namespace fallow
