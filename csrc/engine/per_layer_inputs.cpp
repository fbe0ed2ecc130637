#include "engine/per_layer_inputs.h"

#include <cmath>

#include "engine/activation.h"
#include "engine/norm.h"

namespace fallow {

PerLayerInputs::PerLayerInputs(Runtime& run, Products& products, const Packed& model, size_t tokens)
    : run_(run), products_(products), model_(model), width_(model.config.hidden_size_per_layer_input),
      all_(model.config.n_layers * width_), inputs_(tokens * all_), row_(all_),
      gated_(tokens, width_, run.kernels) {}

void PerLayerInputs::begin(const Input& x, size_t n) {
  products_.multiply(x, n, {model_.per_layer_model_projection, nullptr, inputs_.data(), kTaps});
  const float scale = 1 / std::sqrt(static_cast<float>(model_.config.hidden_size));
  run_.for_tokens(n, [&](size_t t, int) {
    for (float *y = inputs_.data() + t * all_, *end = y + all_; y != end; y += width_) {
      for (size_t i = 0; i < width_; ++i) y[i] *= scale;
      normalize(run_.kernels, model_.config, model_.per_layer_projection_norm, y, width_, y);
    }
  });
}

void PerLayerInputs::add_row(size_t token, const uint8_t* row) {
  run_.kernels.decode(model_.embed_tokens_per_layer.type, row, all_, row_.data());
  const float scale = std::sqrt(static_cast<float>(width_)), half = std::sqrt(0.5f);
  float* y = inputs_.data() + token * all_;
  for (size_t i = 0; i < all_; ++i) y[i] = (y[i] + row_[i] * scale) * half;
}

void PerLayerInputs::forward(size_t l, const Input& x, size_t n, float* out) {
  const Layer& layer = model_.layers[l];
  products_.multiply(x, n, {layer.per_layer_input_gate, nullptr, gated_.x.data(), kTaps});
  run_.for_tokens(n, [&](size_t t, int) {
    float* gate = gated_.x.data() + t * width_;
    const float* input = inputs_.data() + t * all_ + l * width_;
    activate(run_.kernels, model_.config, gate, width_);
    for (size_t i = 0; i < width_; ++i) gate[i] *= input[i];
  });
  products_.prepare(gated_, n);
  products_.multiply(gated_, n, {layer.per_layer_projection, nullptr, out, kTaps});
}

}  // namespace fallow
