// RMSNorm, LayerNorm, and soft caps.
#pragma once

#include <cmath>

#include "engine/packed.h"
#include "engine/runtime.h"

namespace fallow {

// y = norm(x), both (width,); they may be the same.
inline void normalize(const Kernels& kernels, const Config& config, const Norm& norm, const float* x,
                      size_t width, float* y) {
  const auto n = static_cast<float>(width);
  if (config.layer_norm) {
    float mean = 0;
    for (size_t i = 0; i < width; ++i) mean += x[i];
    mean /= n;
    for (size_t i = 0; i < width; ++i) y[i] = x[i] - mean;
    x = y;
  }
  const float scale = 1 / std::sqrt(kernels.sum_squares(x, width) / n + config.norm_eps);
  for (size_t i = 0; i < width; ++i) y[i] = x[i] * scale * norm.weight[i];
  if (norm.bias) add_to(y, norm.bias, width);
}

// In place x = cap tanh(x / cap); 0: x as it is.
inline void soft_cap(float* x, size_t n, float cap) {
  if (cap == 0) return;
  for (size_t i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

}  // namespace fallow
