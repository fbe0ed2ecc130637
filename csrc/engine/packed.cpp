#include "engine/packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "formats/dequant.h"
#include "formats/gguf.h"
#include "kernels/kernels.h"

namespace fallow {
namespace {

// A layer more or a token more is no model, and would overflow sizes below.
constexpr uint64_t kLargest = 1u << 24;
// Later versions may say more of how to compute, and otherwise are version 2.
constexpr uint32_t kVersion = 5, kOldest = 2;
constexpr uint32_t kFfnVersion = 1;

class Reader {
 public:
  Reader(const uint8_t* data, uint64_t size) : data_(data), header_(parse_gguf(data, size)) {}

  uint32_t count(const std::string& name, uint64_t lowest, uint64_t highest = kLargest) const {
    return in_range(name, scalar(name), lowest, highest);
  }

  // The same of a key that may be left out.
  uint32_t count_or(uint32_t otherwise, const std::string& name, uint64_t lowest,
                    uint64_t highest = kLargest) const {
    return has_key(name) ? count(name, lowest, highest) : otherwise;
  }

  std::vector<uint32_t> counts(const std::string& name, uint64_t n, uint64_t highest) const {
    const GgufField& found = field(name);
    if (!found.is_array || found.count != n)
      throw PackedError(key(name) + " must be an array of " + std::to_string(n) + " values");
    std::vector<uint32_t> values;
    values.reserve(n);
    for (uint64_t i = 0; i < n; ++i) values.push_back(in_range(name, item(found, i), 0, highest));
    return values;
  }

  // The same of a key that may be left out.
  std::vector<uint32_t> counts_or(std::vector<uint32_t> otherwise, const std::string& name, uint64_t highest) const {
    return has_key(name) ? counts(name, otherwise.size(), highest) : otherwise;
  }

  uint64_t length(const std::string& name) const { return field(name).count; }

  template <class T>
  std::vector<T> list(const std::string& name) const {
    std::vector<T> values;
    const GgufField& found = field(name);
    values.reserve(found.count);
    for (uint64_t i = 0; i < found.count; ++i) {
      const GgufScalar value = item(found, i);
      const T* wanted = std::get_if<T>(&value);
      if (!wanted) throw PackedError(key(name) + " has a value of the wrong type");
      values.push_back(*wanted);
    }
    return values;
  }

  float number(const std::string& name, float otherwise) const {
    return has_key(name) ? number(name) : otherwise;
  }
  float number(const std::string& name) const {
    const GgufScalar found = scalar(name);
    const auto* value = std::get_if<double>(&found);
    if (!value || !std::isfinite(*value) || *value < 0)
      throw PackedError(key(name) + " must be a finite number >= 0");
    return static_cast<float>(*value);
  }

  bool flag(const std::string& name) const {
    const GgufScalar found = scalar(name);
    const auto* value = std::get_if<bool>(&found);
    if (!value) throw PackedError(key(name) + " must be true or false");
    return *value;
  }

  std::string text(const std::string& name) const {
    const GgufScalar found = scalar(name);
    const auto* value = std::get_if<std::string_view>(&found);
    if (!value) throw PackedError(key(name) + " must be a string");
    return std::string(*value);
  }

  bool is_packed() const { return has_key("version"); }
  bool has_key(const std::string& name) const { return header_.find_field(key(name)) != nullptr; }
  bool has(const std::string& tensor) const { return header_.find_tensor(tensor) != nullptr; }
  // Whether there is this vector, and it has more than n values.
  bool is_wide(const std::string& name, uint64_t n) const {
    const GgufTensor* found = header_.find_tensor(name);
    return found && found->n_dims == 1 && found->dims[0] > n;
  }

  // A matrix of a type that the engine computes with.
  Matrix matrix(const std::string& name, uint64_t rows, uint64_t cols) const {
    const GgufTensor& found = tensor(name, {rows, cols});
    const BlockFormat& format = *find_format(found.type);
    if (found.type >= kGgmlTypes || !portable_kernels().gemv_rows[found.type])
      throw PackedError("tensor " + name + " has the unsupported type " + format.name);
    return {data_ + found.offset, found.type, rows, cols,
            cols / format.block_size * format.block_bytes};
  }

  Matrix two_bits(const std::string& name, uint64_t rows, uint64_t cols) const {
    const uint64_t row_bytes = two_bits_bytes(cols);
    if (cols % 4 != 0 || cols > kTwoBitsWidest)
      throw PackedError(name + " cannot have rows of " + std::to_string(cols) + " weights");
    return {bytes(name, rows, row_bytes), kTwoBits, rows, cols, row_bytes};
  }

  Matrix float_matrix(const std::string& name, uint64_t rows, uint64_t cols) const {
    const Matrix found = matrix(name, rows, cols);
    if (found.type != kF32) throw PackedError("tensor " + name + " must be F32");
    return found;
  }

  const float* vector(const std::string& name, uint64_t n) const {
    return floats(tensor(name, {n}));
  }
  const float* optional_vector(const std::string& name, uint64_t n) const {
    return has(name) ? vector(name, n) : nullptr;
  }
  const float* table(const std::string& name, uint64_t rows, uint64_t cols) const {
    return has(name) ? floats(tensor(name, {rows, cols})) : nullptr;
  }

  Norm norm(const std::string& name, uint64_t n) const {
    return {vector(name + ".weight", n), optional_vector(name + ".bias", n)};
  }
  Norm optional_norm(const std::string& name, uint64_t n) const {
    return has(name + ".weight") ? norm(name, n) : Norm{};
  }

 private:
  static std::string key(const std::string& name) { return "fallow." + name; }

  const GgufField& field(const std::string& name) const {
    const GgufField* found = header_.find_field(key(name));
    if (!found) throw PackedError("the file has no " + key(name));
    return *found;
  }

  GgufScalar scalar(const std::string& name) const {
    const GgufField& found = field(name);
    if (found.is_array) throw PackedError(key(name) + " must be one value");
    return found.at(0);
  }

  // Of no array of strings, whose items have no fixed places.
  static GgufScalar item(const GgufField& of, uint64_t i) {
    if (of.type == kGgufString) throw PackedError(std::string(of.name) + " must not be of strings");
    return of.at(i);
  }

  static uint32_t in_range(const std::string& name, const GgufScalar& value, uint64_t lowest,
                           uint64_t highest) {
    const auto* number = std::get_if<uint64_t>(&value);
    if (!number || *number < lowest || *number > highest)
      throw PackedError(key(name) + " must be an unsigned integer from " + std::to_string(lowest) +
                        " to " + std::to_string(highest));
    return static_cast<uint32_t>(*number);
  }

  static std::string shape_text(std::span<const uint64_t> shape) {
    std::string text;
    for (auto n : shape) text += (text.empty() ? "(" : ", ") + std::to_string(n);
    return text + ")";
  }

  const GgufTensor& tensor(const std::string& name, const std::vector<uint64_t>& shape) const {
    const GgufTensor* found = header_.find_tensor(name);
    if (!found) throw PackedError("the file has no tensor " + name);
    if (!std::ranges::equal(found->shape(), shape))
      throw PackedError("tensor " + name + " has the shape " + shape_text(found->shape()) +
                        ", expected " + shape_text(shape));
    return *found;
  }

  const uint8_t* bytes(const std::string& name, uint64_t rows, uint64_t cols) const {
    const GgufTensor& found = tensor(name, {rows, cols});
    if (std::string(find_format(found.type)->name) != "I8")
      throw PackedError("tensor " + name + " must be I8");
    return data_ + found.offset;
  }

  const float* floats(const GgufTensor& tensor) const {
    if (tensor.type != kF32) throw PackedError("tensor " + std::string(tensor.name) + " must be F32");
    // Offsets are multiples of general.alignment, which may be 1 in a hostile file.
    if (tensor.offset % alignof(float) != 0)
      throw PackedError("tensor " + std::string(tensor.name) + " is not aligned");
    return reinterpret_cast<const float*>(data_ + tensor.offset);
  }

  const uint8_t* data_;
  GgufHeader header_;
};

Act read_act(const std::string& name) {
  if (name == "silu") return Act::kSilu;
  if (name == "gelu_tanh") return Act::kGeluTanh;
  if (name == "gelu") return Act::kGelu;
  if (name == "relu" || name == "drelu") return Act::kRelu;
  if (name == "relu2") return Act::kRelu2;
  if (name == "fatrelu") return Act::kFatRelu;
  if (name == "swiglu_oai") return Act::kSwigluOai;
  throw PackedError("fallow.activation " + name +
                    " is unknown; known: silu, gelu_tanh, gelu, relu, relu2, fatrelu, drelu, swiglu_oai");
}

Config read_config(const Reader& in) {
  Config c{};
  c.hidden_size = in.count("hidden_size", 1);
  c.intermediate_size = in.count("intermediate_size", 1);
  c.n_layers = in.count("n_layers", 1, 1 << 16);
  c.n_heads = in.count("n_heads", 1, 1 << 16);
  c.n_kv_heads = in.count("n_kv_heads", 1, c.n_heads);
  c.head_dim = in.count("head_dim", 1, 1 << 16);
  c.vocab_size = in.count("vocab_size", 1);
  c.context_length = in.count("context_length", 1);
  c.rotary_dim = in.count("rotary_dim", 0, c.head_dim);
  c.attention_scale = in.number("attention_scale");
  c.rope_scale = in.number("rope_scale", 1);  // of version 2
  c.embedding_scale = in.number("embedding_scale");
  c.residual_scale = in.number("residual_scale", 1);
  c.temperature_scale = in.number("temperature_scale", 0);
  if (c.temperature_scale > 0) c.temperature_length = in.count("temperature_length", 1);
  c.attention_softcap = in.number("attention_softcap", 0);
  c.logit_softcap = in.number("logit_softcap", 0);
  c.norm_eps = in.number("norm_eps");
  c.layer_norm = in.flag("layer_norm");
  c.gated = in.flag("gated");
  c.parallel = in.flag("parallel");
  c.act = read_act(in.text("activation"));
  c.rectifies_up = in.text("activation") == "drelu";
  if (c.rectifies_up && !c.gated) throw PackedError("fallow.activation drelu needs fallow.gated");
  if (c.act == Act::kFatRelu) c.activation_threshold = in.number("activation_threshold");
  if (c.n_heads % c.n_kv_heads != 0)
    throw PackedError("fallow.n_heads must be a multiple of fallow.n_kv_heads");
  if (c.rotary_dim % 2 != 0) throw PackedError("fallow.rotary_dim must be even");
  c.hidden_size_per_layer_input = in.count_or(0, "hidden_size_per_layer_input", 1, 1 << 16);
  c.n_experts = in.count_or(0, "n_experts", 1, 1 << 16);
  if (c.n_experts > 0) {
    c.n_experts_used = in.count("n_experts_used", 1, c.n_experts);
    c.shared_intermediate_size = in.count("shared_intermediate_size", 0);
    c.norm_experts = in.flag("norm_experts");
    if (!c.gated) throw PackedError("fallow.gated must be true of a mixture of experts");
    if (c.rectifies_up) throw PackedError("fallow.activation of experts cannot be drelu");
  }
  if (c.act == Act::kSwigluOai) {
    c.swiglu_alpha = in.number("swiglu_alpha");
    c.swiglu_limit = in.number("swiglu_limit");
    if (c.n_experts == 0 || c.swiglu_alpha == 0)
      throw PackedError("fallow.activation swiglu_oai is for experts, with a fallow.swiglu_alpha above 0");
  }
  return c;
}

Expert read_expert(const Reader& in, const std::string& p, uint64_t d_ff, uint64_t hidden) {
  return {in.matrix(p + "gate_proj.weight", d_ff, hidden), in.matrix(p + "up_proj.weight", d_ff, hidden),
          in.matrix(p + "down_proj_t.weight", d_ff, hidden)};
}

void read_experts(const Reader& in, const Config& c, const std::string& p, Layer& l) {
  const uint64_t hidden = c.hidden_size;
  l.router = in.float_matrix(p + "router.weight", c.n_experts, hidden);
  l.router_bias = in.optional_vector(p + "router.bias", c.n_experts);
  l.down_norm = in.table(p + "down_norm", c.n_experts, c.intermediate_size);
  const float* gate_bias = in.table(p + "gate_proj.bias", c.n_experts, c.intermediate_size);
  const float* up_bias = in.table(p + "up_proj.bias", c.n_experts, c.intermediate_size);
  const float* down_bias = in.table(p + "down_proj.bias", c.n_experts, hidden);
  for (uint32_t e = 0; e < c.n_experts; ++e) {
    Expert& expert = l.experts.emplace_back(
        read_expert(in, p + "experts." + std::to_string(e) + ".", c.intermediate_size, hidden));
    if (gate_bias) expert.gate_bias = gate_bias + uint64_t{e} * c.intermediate_size;
    if (up_bias) expert.up_bias = up_bias + uint64_t{e} * c.intermediate_size;
    if (down_bias) expert.down_bias = down_bias + e * hidden;
  }
  if (c.shared_intermediate_size == 0) return;
  l.shared_expert_gate = in.float_matrix(p + "shared_expert_gate.weight", 1, hidden);
  l.experts.push_back(read_expert(in, p + "shared_expert.", c.shared_intermediate_size, hidden));
}

void read_ffn(const Reader& in, const Config& c, const std::string& p, Layer& l) {
  const uint64_t hidden = c.hidden_size, d_ff = l.intermediate_size;
  if (c.gated) {
    l.gate_proj = in.matrix(p + "gate_proj.weight", d_ff, hidden);
    l.gate_bias = in.optional_vector(p + "gate_proj.bias", d_ff);
  }
  if (in.has(p + "gate_coarse.codes")) {
    if (!c.gated || !c.has_zeros())
      throw PackedError("tensor " + p + "gate_coarse.codes is for a gate that a ReLU follows");
    l.gate_coarse = in.two_bits(p + "gate_coarse.codes", d_ff, hidden);
    l.gate_coarse_bias = in.vector(p + "gate_coarse.bias", d_ff);
  }
  l.up_proj = in.matrix(p + "up_proj.weight", d_ff, hidden);
  l.up_bias = in.optional_vector(p + "up_proj.bias", d_ff);
  l.down_proj_t = in.matrix(p + "down_proj_t.weight", d_ff, hidden);
  l.down_bias = in.optional_vector(p + "down_proj.bias", hidden);
  l.down_norm = in.vector(p + "down_norm", d_ff);
}

// What each layer has for itself.
struct Sizes {
  std::vector<uint32_t> intermediate_size, n_kv_heads, head_dim, rotary_dim, kv_layer, values_are_keys;
};

Sizes read_sizes(const Reader& in, const Config& c) {
  std::vector<uint32_t> own(c.n_layers);
  std::iota(own.begin(), own.end(), 0);
  const auto same = [&](uint32_t value) { return std::vector<uint32_t>(c.n_layers, value); };
  Sizes all{
      in.counts_or(same(c.intermediate_size), "layer_intermediate_size", c.intermediate_size),
      in.counts_or(same(c.n_kv_heads), "layer_n_kv_heads", c.n_kv_heads),
      in.counts_or(same(c.head_dim), "layer_head_dim", c.head_dim),
      in.counts_or(same(c.rotary_dim), "layer_rotary_dim", c.rotary_dim),
      in.counts_or(own, "kv_layer", c.n_layers - 1),
      in.counts_or(same(0), "values_are_keys", 1)};
  for (uint32_t i = 0; i < c.n_layers; ++i) {
    const uint32_t from = all.kv_layer[i];
    if (all.intermediate_size[i] == 0) throw PackedError("fallow.layer_intermediate_size must not be 0");
    if (c.n_experts > 0 && all.intermediate_size[i] != c.intermediate_size)
      throw PackedError("fallow.layer_intermediate_size is not for a mixture of experts");
    if (all.n_kv_heads[i] == 0 || c.n_heads % all.n_kv_heads[i] != 0)
      throw PackedError("fallow.n_heads must be a multiple of each fallow.layer_n_kv_heads");
    if (all.head_dim[i] == 0) throw PackedError("fallow.layer_head_dim must not be 0");
    if (all.rotary_dim[i] > all.head_dim[i] || all.rotary_dim[i] % 2 != 0)
      throw PackedError("fallow.layer_rotary_dim must be even and at most the layer's head_dim");
    if (from > i || all.kv_layer[from] != from || all.n_kv_heads[from] != all.n_kv_heads[i] ||
        all.head_dim[from] != all.head_dim[i])
      throw PackedError("fallow.kv_layer must name earlier layers with such heads and a cache of their own");
  }
  return all;
}

Layer read_layer(const Reader& in, const Config& c, const Sizes& sizes, uint32_t index) {
  const std::string p = "layers." + std::to_string(index) + ".";
  Layer l;
  l.intermediate_size = sizes.intermediate_size[index];
  l.n_kv_heads = sizes.n_kv_heads[index];
  l.head_dim = sizes.head_dim[index];
  l.rotary_dim = sizes.rotary_dim[index];
  l.kv_layer = sizes.kv_layer[index];
  const uint64_t hidden = c.hidden_size;
  const uint64_t q = uint64_t{c.n_heads} * l.head_dim, kv = uint64_t{l.n_kv_heads} * l.head_dim;
  l.attn_post_norm = in.optional_norm(p + "attn_post_norm", hidden);
  l.ffn_post_norm = in.optional_norm(p + "ffn_post_norm", hidden);
  // Each branch is normed before or after; a parallel FFN may read the norm of the attention.
  l.attn_norm = l.attn_post_norm.weight ? in.optional_norm(p + "attn_norm", hidden) : in.norm(p + "attn_norm", hidden);
  l.ffn_norm = c.parallel || l.ffn_post_norm.weight ? in.optional_norm(p + "ffn_norm", hidden)
                                                    : in.norm(p + "ffn_norm", hidden);
  l.attn_sub_norm = in.optional_norm(p + "attn_sub_norm", q);
  l.ffn_sub_norm = in.optional_norm(p + "ffn_sub_norm", l.intermediate_size);
  l.norms_heads = !in.is_wide(p + "q_norm.weight", l.head_dim);
  l.q_norm = in.optional_norm(p + "q_norm", l.norms_heads ? l.head_dim : q);
  l.q_proj = in.matrix(p + "q_proj.weight", q, hidden);
  l.q_bias = in.optional_vector(p + "q_proj.bias", q);
  if (l.kv_layer == index) {
    l.k_norm = in.optional_norm(p + "k_norm", l.norms_heads ? l.head_dim : kv);
    l.v_norm = in.optional_norm(p + "v_norm", l.head_dim);
    l.k_proj = in.matrix(p + "k_proj.weight", kv, hidden);
    l.k_bias = in.optional_vector(p + "k_proj.bias", kv);
    if (!sizes.values_are_keys[index]) {
      l.v_proj = in.matrix(p + "v_proj.weight", kv, hidden);
      l.v_bias = in.optional_vector(p + "v_proj.bias", kv);
    }
  }
  l.o_proj = in.matrix(p + "o_proj.weight", hidden, q);
  l.o_bias = in.optional_vector(p + "o_proj.bias", hidden);
  l.sinks = in.optional_vector(p + "sinks", c.n_heads);
  c.n_experts > 0 ? read_experts(in, c, p, l) : read_ffn(in, c, p, l);
  if (const uint32_t width = c.hidden_size_per_layer_input; width > 0) {
    l.per_layer_input_gate = in.matrix(p + "per_layer_input_gate.weight", width, hidden);
    l.per_layer_projection = in.matrix(p + "per_layer_projection.weight", hidden, width);
    l.post_per_layer_input_norm = in.norm(p + "post_per_layer_input_norm", hidden);
  }
  l.layer_scalar = in.optional_vector(p + "layer_scalar", 1);
  return l;
}

}  // namespace

Packed read_packed(const uint8_t* data, uint64_t size) {
  const Reader in(data, size);
  if (!in.is_packed())
    throw PackedError("it is a GGUF file, but not a packed model; make one with: fallow pack");
  if (const uint32_t version = in.count("version", 0, UINT32_MAX); version < kOldest || version > kVersion)
    throw PackedError("it was packed by another version of fallow; pack it again");
  Packed model;
  model.config = read_config(in);
  const Config& c = model.config;
  const auto windows = in.counts("sliding_window", c.n_layers, kLargest);
  const auto ropes = in.counts("rope", c.n_layers, c.n_layers);
  const uint32_t n_outliers = in.count("n_outliers", 0, c.n_experts > 0 ? 0 : c.intermediate_size);
  const auto outliers = n_outliers > 0
                            ? in.counts("outliers", uint64_t{c.n_layers} * n_outliers,
                                        c.intermediate_size - 1)
                            : std::vector<uint32_t>{};
  const Sizes sizes = read_sizes(in, c);
  for (uint32_t i = 0; i < c.n_layers; ++i) {
    model.layers.push_back(read_layer(in, c, sizes, i));
    if (n_outliers > 0) {
      Layer& l = model.layers.back();
      l.outliers = in.matrix("layers." + std::to_string(i) + ".outliers.weight", n_outliers,
                             c.hidden_size);
      const auto first = outliers.begin() + static_cast<std::ptrdiff_t>(i) * n_outliers;
      l.outlier_neurons.assign(first, first + n_outliers);
      if (*std::max_element(first, first + n_outliers) >= l.intermediate_size)
        throw PackedError("fallow.outliers names neurons that layer " + std::to_string(i) + " does not have");
    }
    model.layers.back().sliding_window = windows[i];
    if (Layer& l = model.layers.back(); l.rotary_dim > 0) {
      const std::string rope = "rope." + std::to_string(ropes[i]);
      l.inv_freq = in.vector(rope + ".inv_freq", l.rotary_dim / 2);
      // Of what is read here, values come later: under a memory budget only the header is there yet.
      l.rope_scale = in.optional_vector(rope + ".scale", 1);
    }
  }
  model.embed_tokens = in.matrix("embed_tokens.weight", c.vocab_size, c.hidden_size);
  model.lm_head = in.has("lm_head.weight")
                      ? in.matrix("lm_head.weight", c.vocab_size, c.hidden_size)
                      : model.embed_tokens;
  model.lm_head_bias = in.optional_vector("lm_head.bias", c.vocab_size);
  if (in.has("lm_head_coarse.codes"))
    model.lm_head_coarse = in.two_bits("lm_head_coarse.codes", c.vocab_size, c.hidden_size);
  model.lm_head_coarse_bias = in.optional_vector("lm_head_coarse.bias", c.vocab_size);
  if (!model.lm_head_coarse_bias) model.lm_head_coarse_bias = model.lm_head_bias;
  model.embed_positions = in.table("embed_positions", c.context_length, c.hidden_size);
  model.norm = in.norm("norm", c.hidden_size);
  if (const uint64_t width = c.hidden_size_per_layer_input; width > 0) {
    model.embed_tokens_per_layer = in.matrix("embed_tokens_per_layer.weight", c.vocab_size, c.n_layers * width);
    model.per_layer_model_projection =
        in.matrix("per_layer_model_projection.weight", c.n_layers * width, c.hidden_size);
    model.per_layer_projection_norm = in.norm("per_layer_projection_norm", width);
  }
  return model;
}

size_t Packed::width_of(size_t layer, Tap tap) const {
  const Config& c = config;
  const Layer& l = layers[layer];
  if (tap == kOInput) return size_t{c.n_heads} * l.head_dim;
  if (tap == kRouter) return c.n_experts;
  if (tap >= kGatePre && tap <= kInter) return size_t{std::max(1u, c.n_experts)} * l.intermediate_size;
  return tap == kDownInput ? l.intermediate_size : c.hidden_size;
}

FfnFile read_ffn_file(const uint8_t* data, uint64_t size) {
  const Reader in(data, size);
  const bool is_packed = in.is_packed();
  if (!in.has_key("ffn.version"))
    throw PackedError(is_packed ? "this packed model has not what llama.cpp needs of it; make a file that has, or "
                                  "learn why not, with: fallow llama pack MODEL.gguf --packed THIS -o FILE"
                                : "it is not a file of fallow llama pack, and no packed model");
  if (in.count("ffn.version", 0, UINT32_MAX) != kFfnVersion)
    throw PackedError("it was made by another version of fallow; make it again with: fallow llama pack");
  FfnFile file;
  const std::string own = is_packed ? "" : "ffn.";
  const uint32_t n_layers = in.count(own + "n_layers", 1, 1 << 16), hidden = in.count(own + "hidden_size", 1),
                 d_ff = in.count(own + "intermediate_size", 1);
  if (in.length("ffn.fingerprints") != size_t{3} * n_layers)
    throw PackedError("fallow.ffn.fingerprints must have three values per layer");
  file.fingerprints = in.list<uint64_t>("ffn.fingerprints");
  const uint32_t n_outliers = in.count(own + "n_outliers", 0, d_ff);
  const auto outliers = n_outliers > 0 ? in.counts(own + "outliers", uint64_t{n_layers} * n_outliers, d_ff - 1)
                                       : std::vector<uint32_t>{};
  for (uint32_t i = 0; i < n_layers; ++i) {
    const std::string p = "layers." + std::to_string(i) + ".";
    Layer& layer = file.layers.emplace_back();
    layer.down_proj_t = in.matrix(p + "down_proj_t.weight", d_ff, hidden);
    if (is_packed) {
      if (in.has(p + "gate_proj.weight")) layer.gate_proj = in.matrix(p + "gate_proj.weight", d_ff, hidden);
      layer.up_proj = in.matrix(p + "up_proj.weight", d_ff, hidden);
    }
    if (n_outliers == 0) continue;
    layer.outliers = in.matrix(p + "outliers.weight", n_outliers, hidden);
    const auto first = outliers.begin() + static_cast<std::ptrdiff_t>(i) * n_outliers;
    layer.outlier_neurons.assign(first, first + n_outliers);
  }
  if (in.has_key("ffn.note")) file.note = in.text("ffn.note");
  if (!in.has_key("ffn.cuts.layer")) return file;
  file.cuts.resize(n_layers);
  const auto values = in.list<double>("ffn.cuts.value");
  const auto layers = in.counts("ffn.cuts.layer", values.size(), n_layers - 1),
             taps = in.counts("ffn.cuts.tap", values.size(), kTaps - 1),
             kinds = in.counts("ffn.cuts.by", values.size(), kLastBy);
  for (size_t i = 0; i < values.size(); ++i) {
    const bool of_inputs = taps[i] == kGateInput || taps[i] == kUpInput;
    if (taps[i] < kGateInput || taps[i] > kFfnOut || !std::isfinite(values[i]))
      throw PackedError("fallow.ffn.cuts has a cut that is none of an FFN");
    Cut& cut = file.cuts[layers[i]][taps[i]];
    cut.by = static_cast<Cut::By>(kinds[i]);
    cut.value = values[i];
    const std::string name = "cuts." + std::to_string(i) + ".weight";
    const uint64_t width = of_inputs || taps[i] == kFfnOut ? hidden : d_ff;
    if (const float* weight = in.optional_vector(name, width)) cut.weight.assign(weight, weight + width);
  }
  return file;
}

uint64_t fingerprint(const uint8_t* data, uint64_t n) {
  // Four sums at a time, since each waits for its multiplication.
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  uint64_t sums[4] = {n, 1, 2, 3};
  const auto add = [](uint64_t& sum, uint64_t word) {
    sum = (sum ^ word) * kOdd;
    sum ^= sum >> 29;
  };
  uint64_t words[4];
  for (; n >= sizeof words; n -= sizeof words, data += sizeof words) {
    std::memcpy(words, data, sizeof words);
    for (int i = 0; i < 4; ++i) add(sums[i], words[i]);
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, data, n);
  for (int i = 0; i < 4; ++i) add(sums[i], words[i]);
  for (int i = 1; i < 4; ++i) add(sums[0], sums[i]);
  return sums[0];
}

}  // namespace fallow
