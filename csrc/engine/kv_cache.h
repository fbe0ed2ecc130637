// Keys and values of the tokens read so far, f16, as the batched products take them: panels of kPanel
// positions of keys (head_dim, kPanel), and panels of kPanel columns of values (context, kPanel).
// Layers may differ in their heads.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "engine/runtime.h"
#include "platform/file.h"

namespace fallow {

class KvCache {
 public:
  // Of a layer; without heads it keeps nothing.
  struct Heads {
    size_t count, dim;
  };

  KvCache(const std::vector<Heads>& layers, size_t context) : context_(context) {
    size_t size = 0, widest = 0;
    for (const Heads& heads : layers) {
      layers_.push_back({heads, size, 0});
      size += heads.count * key_panels() * heads.dim * kPanel;
      widest = std::max(widest, heads.dim);
    }
    for (Layer& l : layers_) {
      l.values = size;
      size += l.heads.count * pieces(l.heads.dim, kPanel) * context * kPanel;
    }
    half_.resize(widest);
    pages_ = std::make_unique<Pages>(size * sizeof(uint16_t));
    pages_->expect(0, pages_->size());
    std::fill_n(pages_->data(), pages_->size(), uint8_t{0});  // now, not by and by: a memory budget counts it
  }

  size_t context() const { return context_; }

  // Keys and values (kv_heads, head_dim) of the token at a position.
  void store(const Kernels& kernels, size_t layer, size_t position, const float* k, const float* v) {
    const auto [heads, dim] = layers_[layer].heads;
    for (size_t h = 0; h < heads; ++h) {
      kernels.to_f16(k + h * dim, dim, half_.data());
      uint16_t* key = keys(layer, h, position / kPanel) + position % kPanel;
      for (size_t i = 0; i < dim; ++i) key[i * kPanel] = half_[i];
      kernels.to_f16(v + h * dim, dim, half_.data());
      for (size_t i = 0; i < dim; i += kPanel)
        std::copy_n(half_.data() + i, std::min(kPanel, dim - i),
                    values(layer, h, i / kPanel) + position * kPanel);
    }
  }

  // A panel of one head's keys, and of its values.
  uint16_t* keys(size_t layer, size_t kv_head, size_t panel) {
    const Layer& l = layers_[layer];
    return all() + l.keys + (kv_head * key_panels() + panel) * l.heads.dim * kPanel;
  }
  uint16_t* values(size_t layer, size_t kv_head, size_t panel) {
    const Layer& l = layers_[layer];
    return all() + l.values + (kv_head * pieces(l.heads.dim, kPanel) + panel) * context_ * kPanel;
  }

 private:
  struct Layer {
    Heads heads;
    size_t keys, values;  // where they begin
  };

  uint16_t* all() const { return reinterpret_cast<uint16_t*>(pages_->data()); }  // keys, then values
  size_t key_panels() const { return pieces(context_, kPanel); }

  size_t context_;
  std::vector<Layer> layers_;
  std::vector<uint16_t> half_;
  std::unique_ptr<Pages> pages_;
};

}  // namespace fallow
