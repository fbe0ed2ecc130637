// The FFN's activation.
#pragma once

#include <algorithm>
#include <cmath>

#include "engine/packed.h"
#include "kernels/kernels.h"

namespace fallow {

// In place, n values.
inline void activate(const Kernels& kernels, const Config& config, float* x, size_t n) {
  switch (config.act) {
    case Act::kSilu: return kernels.silu(x, n);
    case Act::kGeluTanh: return kernels.gelu_tanh(x, n);
    case Act::kGelu:
      for (size_t i = 0; i < n; ++i) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
      return;
    case Act::kRelu:
      for (size_t i = 0; i < n; ++i) x[i] = std::max(x[i], 0.0f);
      return;
    case Act::kRelu2:
      for (size_t i = 0; i < n; ++i) x[i] = std::max(x[i], 0.0f) * std::max(x[i], 0.0f);
      return;
    case Act::kFatRelu:
      for (size_t i = 0; i < n; ++i) x[i] = x[i] <= config.activation_threshold ? 0.0f : x[i];
      return;
  }
}

}  // namespace fallow
