// Keys and values of the tokens read so far, f16, as the batched products take them: panels of kPanel
// positions of keys (head_dim, kPanel), and panels of kPanel columns of values (context, kPanel).
#pragma once

#include <algorithm>
#include <vector>

#include "engine/runtime.h"
#include "platform/file.h"

namespace fallow {

class KvCache {
 public:
  KvCache(size_t layers, size_t kv_heads, size_t head_dim, size_t context)
      : kv_heads_(kv_heads), head_dim_(head_dim), context_(context), half_(head_dim),
        n_keys_(layers * kv_heads * pieces(context, kPanel) * head_dim * kPanel),
        pages_((n_keys_ + layers * kv_heads * pieces(head_dim, kPanel) * kPanel * context) * sizeof(uint16_t)) {
    pages_.expect(0, pages_.size());
    std::fill_n(pages_.data(), pages_.size(), uint8_t{0});  // now, not by and by: a memory budget counts it
  }

  size_t context() const { return context_; }

  // Keys and values (kv_heads, head_dim) of the token at a position.
  void store(const Kernels& kernels, size_t layer, size_t position, const float* k, const float* v) {
    for (size_t h = 0; h < kv_heads_; ++h) {
      kernels.to_f16(k + h * head_dim_, head_dim_, half_.data());
      uint16_t* key = keys(layer, h, position / kPanel) + position % kPanel;
      for (size_t i = 0; i < head_dim_; ++i) key[i * kPanel] = half_[i];
      kernels.to_f16(v + h * head_dim_, head_dim_, half_.data());
      for (size_t i = 0; i < head_dim_; i += kPanel)
        std::copy_n(half_.data() + i, std::min(kPanel, head_dim_ - i),
                    values(layer, h, i / kPanel) + position * kPanel);
    }
  }

  // A panel of one head's keys, and of its values.
  uint16_t* keys(size_t layer, size_t kv_head, size_t panel) {
    const size_t before = (layer * kv_heads_ + kv_head) * pieces(context_, kPanel) + panel;
    return all() + before * head_dim_ * kPanel;
  }
  uint16_t* values(size_t layer, size_t kv_head, size_t panel) {
    const size_t before = (layer * kv_heads_ + kv_head) * pieces(head_dim_, kPanel) + panel;
    return all() + n_keys_ + before * context_ * kPanel;
  }

 private:
  uint16_t* all() const { return reinterpret_cast<uint16_t*>(pages_.data()); }  // keys, then values

  size_t kv_heads_, head_dim_, context_;
  std::vector<uint16_t> half_;
  size_t n_keys_;
  Pages pages_;
};

}  // namespace fallow
