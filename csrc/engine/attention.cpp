#include "engine/attention.h"

#include <algorithm>
#include <cmath>

#include "engine/norm.h"

namespace fallow {
namespace {

// Queries that are answered at once, and cached positions that are decoded at once.
constexpr size_t kQueries = 96, kPositions = 128;

}  // namespace

Attention::Attention(Runtime& run, Products& products, const Packed& model, size_t tokens,
                     size_t context)
    : run_(run), products_(products), model_(model), config_(model.config),
      cache_(config_.n_layers, config_.n_kv_heads, config_.head_dim, context),
      mixed_(tokens, size_t{config_.n_heads} * config_.head_dim, run.kernels),
      scratch_(run.n_threads()) {
  q_.resize(tokens * mixed_.width);
  k_.resize(tokens * config_.n_kv_heads * config_.head_dim);
  v_.resize(k_.size());
  cos_.resize(tokens * config_.rotary_dim / 2);
  sin_.resize(cos_.size());
  const size_t queries = std::max<size_t>(kQueries, config_.n_heads / config_.n_kv_heads);
  for (Scratch& own : scratch_) {
    own.scores.resize(queries * context);
    own.sums.resize(queries);
    own.panel.resize(std::max<size_t>(kPositions, config_.head_dim) * kPanel);
  }
}

void Attention::begin(size_t position) {
  position_ = position;
  turned_ = nullptr;
}

void Attention::attend(size_t l, const Input& x, size_t n, float* out) {
  const Layer& layer = model_.layers[l];
  Timing& timing = run_.statistics.timing;
  Clock clock;
  products_.multiply(l, x, n,
                     {{layer.q_proj, layer.q_bias, q_.data(), kQInput},
                      {layer.k_proj, layer.k_bias, k_.data(), kKInput},
                      {layer.v_proj, layer.v_bias, v_.data(), kVInput}});
  clock.mark(timing.attention_proj);
  rotate(layer, layer.q_norm, config_.n_heads, n, q_.data());
  rotate(layer, layer.k_norm, config_.n_kv_heads, n, k_.data());
  const size_t kv = size_t{config_.n_kv_heads} * config_.head_dim;
  for (size_t t = 0; t < n; ++t)
    cache_.store(run_.kernels, l, position_ + t, k_.data() + t * kv, v_.data() + t * kv);
  mix(l, n);
  clock.mark(timing.attention);
  if (layer.attn_sub_norm.weight)
    run_.for_tokens(n, [&](size_t t, int) {
      float* x = mixed_.x.data() + t * mixed_.width;
      normalize(run_.kernels, config_, layer.attn_sub_norm, x, mixed_.width, x);
    });
  products_.prepare(mixed_, n);
  products_.multiply(l, mixed_, n, {{layer.o_proj, layer.o_bias, out, kOInput}});
  clock.mark(timing.attention_proj);
}

// Norm of q or k if the model has one, then rotary embedding of its leading dimensions: dimension i
// turns with i + rotary_dim / 2.
void Attention::rotate(const Layer& layer, const Norm& norm, size_t heads, size_t n, float* x) {
  const size_t dim = config_.head_dim, half = config_.rotary_dim / 2;
  if (half > 0 && turned_ != layer.inv_freq) {
    const float scale = layer.rope_scale ? *layer.rope_scale : config_.rope_scale;
    for (size_t t = 0; t < n; ++t)
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position_ + t) * layer.inv_freq[i];
        cos_[t * half + i] = std::cos(angle) * scale;
        sin_[t * half + i] = std::sin(angle) * scale;
      }
    turned_ = layer.inv_freq;
  }
  run_.for_tokens(n, [&](size_t t, int) {
    const float *c = cos_.data() + t * half, *s = sin_.data() + t * half;
    if (norm.weight && !layer.norms_heads) {
      float* all = x + t * heads * dim;
      normalize(run_.kernels, config_, norm, all, heads * dim, all);
    }
    for (size_t h = 0; h < heads; ++h) {
      float* head = x + (t * heads + h) * dim;
      if (norm.weight && layer.norms_heads) normalize(run_.kernels, config_, norm, head, dim, head);
      for (size_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * c[i] - b * s[i];
        head[i + half] = b * c[i] + a * s[i];
      }
    }
  });
}

// mixed = softmax(q k^T) v. Work is cut into heads that share keys and values, and tiles of tokens. One
// token's heads go to the threads in equal parts; of a block, tiles do, in turn, since late ones see
// more positions.
void Attention::mix(size_t l, size_t n) {
  const size_t kv_heads = config_.n_kv_heads, per_kv = config_.n_heads / kv_heads;
  run_.pool.run([&](int worker) {
    if (is_decode(n)) {
      const Share share = share_of(config_.n_heads, worker, run_.pool.size());
      for (size_t h = share.begin; h < share.end;) {
        const size_t end = std::min((h / per_kv + 1) * per_kv, share.end);
        for (size_t t = 0; t < n; ++t) mix_heads(l, {h, end}, {t, t + 1}, worker);
        h = end;
      }
      return;
    }
    const size_t tile = std::max<size_t>(kQueries / per_kv, 1), tiles = pieces(n, tile);
    for (size_t job = static_cast<size_t>(worker); job < kv_heads * tiles; job += run_.n_threads()) {
      const size_t h = job % kv_heads * per_kv, t = job / kv_heads * tile;
      mix_heads(l, {h, h + per_kv}, {t, std::min(t + tile, n)}, worker);
    }
  });
  if (is_decode(n)) {
    const size_t positions = position_ + n - first_position(l, 0);
    run_.statistics.read(0, positions * kv_heads * config_.head_dim * 2 * sizeof(uint16_t));
  }
}

// Some heads with the same keys, for some tokens of the block, as two small products; row (h, t) of the
// scores belongs to the h-th of these heads and the t-th of the tokens.
void Attention::mix_heads(size_t l, Share heads, Share tokens, int worker) {
  const Kernels& kernels = run_.kernels;
  const size_t dim = config_.head_dim, width = mixed_.width;
  const size_t kv_head = heads.begin / (config_.n_heads / config_.n_kv_heads);
  const size_t count = tokens.end - tokens.begin, n_heads = heads.end - heads.begin;
  const size_t end = position_ + tokens.end;
  const size_t begin = first_position(l, tokens.begin) / kPanel * kPanel, span = end - begin;
  Scratch& own = scratch_[static_cast<size_t>(worker)];
  float *scores = own.scores.data(), *panel = own.panel.data();
  // The queries lie dim apart where there is one token, otherwise one product per head is needed.
  const size_t products = count == 1 ? 1 : n_heads;
  const size_t rows = count == 1 ? n_heads : count, stride = count == 1 ? dim : width;
  // One product takes the cache as it lies (of Gemma-3's attention at 600 tokens that saves a third of
  // the time; Zen 4); for several it is decoded once.
  const bool decodes = products > 1 || !kernels.gemm_f16;
  const auto decode = [&](const uint16_t* half, size_t size) {
    if (decodes) kernels.decode(kF16, reinterpret_cast<const uint8_t*>(half), size, panel);
  };
  const auto multiply = [&](const uint16_t* half, size_t n, size_t k, const float* x, size_t x_stride,
                            bool add, float* y, size_t y_stride) {
    if (decodes) kernels.gemm_f32(panel, n, k, x, x_stride, rows, add, y, y_stride);
    else kernels.gemm_f16(half, n, k, x, x_stride, rows, add, y, y_stride);
  };
  const size_t first = tokens.begin * width + heads.begin * dim;
  for (size_t j = begin; j < end; j += kPanel) {
    const uint16_t* keys = cache_.keys(l, kv_head, j / kPanel);
    decode(keys, dim * kPanel);
    for (size_t h = 0; h < products; ++h)
      multiply(keys, std::min(kPanel, end - j), dim, q_.data() + first + h * dim, stride, false,
               scores + h * rows * span + (j - begin), span);
  }
  for (size_t row = 0; row < n_heads * count; ++row) {
    const size_t t = tokens.begin + row % count;
    const size_t low = first_position(l, t) - begin, high = position_ + t + 1 - begin;
    float* score = scores + row * span;
    for (size_t j = low; j < high; ++j) score[j] *= config_.attention_scale;
    soft_cap(score + low, high - low, config_.attention_softcap);
    own.sums[row] = kernels.softmax_numerators(score + low, high - low);
    std::fill(score, score + low, 0.0f);
    std::fill(score + high, score + span, 0.0f);
  }
  for (size_t i = 0; i < dim; i += kPanel) {
    const size_t columns = std::min(kPanel, dim - i);
    for (size_t j = 0; j < span; j += kPositions) {
      const size_t positions = std::min(kPositions, span - j);
      const uint16_t* values = cache_.values(l, kv_head, i / kPanel) + (begin + j) * kPanel;
      decode(values, positions * kPanel);
      for (size_t h = 0; h < products; ++h)
        multiply(values, columns, positions, scores + h * rows * span + j, span, j > 0,
                 mixed_.x.data() + first + h * dim + i, stride);
    }
  }
  for (size_t row = 0; row < n_heads * count; ++row) {
    float* out = mixed_.x.data() + first + row / count * dim + row % count * width;
    for (size_t i = 0; i < dim; ++i) out[i] /= own.sums[row];
  }
}

// The first position that token t of the block attends to.
size_t Attention::first_position(size_t l, size_t t) const {
  const size_t window = model_.layers[l].sliding_window, end = position_ + t + 1;
  return window && end > window ? end - window : 0;
}

}  // namespace fallow
