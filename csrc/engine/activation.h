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
    case Act::kSwigluOai: return;  // of both halves: activate_experts
  }
}

// What down_proj reads of an expert, in place of what gate_proj puts out; `up` is overwritten, n values each.
//
//   kSwigluOai (gpt-oss):  g = min(gate, limit),  u = min(max(up, -limit), limit),
//                          inter = (u + 1) g sigmoid(alpha g) = (u + 1) / alpha silu(alpha g)
inline void activate_experts(const Kernels& kernels, const Config& config, float* gate, float* up, size_t n) {
  if (config.act == Act::kSwigluOai) {
    const float alpha = config.swiglu_alpha, limit = config.swiglu_limit;
    for (size_t i = 0; i < n; ++i) gate[i] = alpha * std::min(gate[i], limit);
    for (size_t i = 0; i < n; ++i) up[i] = (std::clamp(up[i], -limit, limit) + 1) / alpha;
    kernels.silu(gate, n);
  } else {
    activate(kernels, config, gate, n);
  }
  for (size_t i = 0; i < n; ++i) gate[i] *= up[i];
}

// The two factors of that by themselves, gate_act and up, in place, n values each.
inline void activate_gate(const Kernels& kernels, const Config& config, float* gate, size_t n) {
  if (config.act != Act::kSwigluOai) return activate(kernels, config, gate, n);
  const float alpha = config.swiglu_alpha, limit = config.swiglu_limit;
  for (size_t i = 0; i < n; ++i) gate[i] = alpha * std::min(gate[i], limit);
  kernels.silu(gate, n);
  for (size_t i = 0; i < n; ++i) gate[i] /= alpha;
}

inline void activate_up(const Config& config, float* up, size_t n) {
  if (config.act != Act::kSwigluOai) return;
  const float limit = config.swiglu_limit;
  for (size_t i = 0; i < n; ++i) up[i] = std::clamp(up[i], -limit, limit) + 1;
}

}  // namespace fallow
