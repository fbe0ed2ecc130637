#include "engine/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/norm.h"

namespace fallow {
namespace {

// Queries that are answered at once, and cached positions that are decoded at once.
constexpr size_t kQueries = 96, kPositions = 128;

}  // namespace

Attention::Attention(Runtime& run, Products& products, const Packed& model, size_t tokens,
                     size_t context, size_t slots)
    : run_(run), products_(products), model_(model), config_(model.config),
      mixed_(tokens, size_t{config_.n_heads} * config_.head_dim, run.kernels),
      scratch_(run.n_threads()) {
  std::vector<KvCache::Heads> kept;
  size_t kv = 0, queries = kQueries;
  for (size_t l = 0; l < config_.n_layers; ++l) {
    const Layer& layer = model.layers[l];
    kept.push_back({layer.kv_layer == l ? layer.n_kv_heads : 0, layer.head_dim});
    kv = std::max(kv, size_t{layer.n_kv_heads} * layer.head_dim);
    queries = std::max<size_t>(queries, config_.n_heads / layer.n_kv_heads);
  }
  for (size_t slot = 0; slot < slots; ++slot) caches_.emplace_back(kept, context);
  q_.resize(tokens * mixed_.width);
  k_.resize(tokens * kv);
  v_.resize(k_.size());
  cos_.resize(tokens * config_.rotary_dim / 2);
  sin_.resize(cos_.size());
  const size_t few = std::min(tokens, kFew), rows = std::max(queries, few * config_.n_heads);
  for (Scratch& own : scratch_) {
    own.scores.resize(queries * context);
    own.largest.resize(rows);
    own.sums.resize(rows);
    own.mixed.resize(few * mixed_.width);
    own.panel.resize(std::max<size_t>(kPositions, config_.head_dim) * kPanel);
  }
}

void Attention::begin(const Place* places) {
  places_ = places;
  turned_ = nullptr;
}

void Attention::attend(size_t l, const Input& x, size_t n, float* out) {
  const Layer& layer = model_.layers[l];
  Timing& timing = run_.statistics.timing;
  Clock clock;
  mixed_.width = size_t{config_.n_heads} * layer.head_dim;
  products_.multiply(l, x, n,
                     {{layer.q_proj, layer.q_bias, q_.data(), kQInput},
                      {layer.k_proj, layer.k_bias, k_.data(), kKInput},
                      {layer.v_proj, layer.v_bias, v_.data(), kVInput}});
  clock.mark(timing.attention_proj);
  rotate(layer, layer.q_norm, config_.n_heads, n, q_.data());
  if (layer.kv_layer == l) keep(l, n);
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

// Keys and values of the tokens enter the cache; where there is no v_proj, values are what k_proj puts out.
void Attention::keep(size_t l, size_t n) {
  const Layer& layer = model_.layers[l];
  const size_t dim = layer.head_dim, kv = layer.n_kv_heads * dim;
  if (!layer.v_proj.data) std::copy_n(k_.data(), n * kv, v_.data());
  rotate(layer, layer.k_norm, layer.n_kv_heads, n, k_.data());
  if (layer.v_norm.weight)
    run_.for_tokens(n, [&](size_t t, int) {
      for (float *v = v_.data() + t * kv, *end = v + kv; v != end; v += dim)
        normalize(run_.kernels, config_, layer.v_norm, v, dim, v);
    });
  for (size_t t = 0; t < n; ++t)
    caches_[places_[t].slot].store(run_.kernels, l, places_[t].position, k_.data() + t * kv, v_.data() + t * kv);
}

// Norm of q or k if the model has one, then rotary embedding of its leading dimensions: dimension i
// turns with i + rotary_dim / 2.
void Attention::rotate(const Layer& layer, const Norm& norm, size_t heads, size_t n, float* x) {
  const size_t dim = layer.head_dim, half = layer.rotary_dim / 2;
  if (half > 0 && turned_ != layer.inv_freq) {
    const float scale = layer.rope_scale ? *layer.rope_scale : config_.rope_scale;
    for (size_t t = 0; t < n; ++t)
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(places_[t].position) * layer.inv_freq[i];
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

// mixed = softmax(q k^T) v, where a head's sink is one more score, of no value. Decode is cut into positions,
// of which every thread takes an equal part: so each reads its part of the cache once for all heads. A block
// is cut into heads that share keys and values, and tiles of tokens, which threads take in turn, since late
// ones see more positions.
void Attention::mix(size_t l, size_t n) {
  const size_t kv_heads = model_.layers[l].n_kv_heads, per_kv = config_.n_heads / kv_heads;
  run_.for_tokens(n, [&](size_t t, int) {
    float* q = q_.data() + t * mixed_.width;
    float scale = config_.attention_scale;
    if (config_.temperature_scale > 0) {
      const size_t lengths = places_[t].position / config_.temperature_length;
      scale *= 1 + config_.temperature_scale * std::log(static_cast<float>(1 + lengths));
    }
    for (size_t i = 0; i < mixed_.width; ++i) q[i] *= scale;
  });
  if (is_decode(n)) {
    run_.pool.run([&](int worker) {
      for (size_t t = 0; t < n; ++t) mix_part(l, t, worker);
    });
    merge_parts(l, n);
    return run_.statistics.read(0, positions_read(l, n) * kv_heads * model_.layers[l].head_dim * 2 * sizeof(uint16_t));
  }
  run_.pool.run([&](int worker) {
    const size_t tile = std::max<size_t>(kQueries / per_kv, 1), tiles = pieces(n, tile);
    for (size_t job = static_cast<size_t>(worker); job < kv_heads * tiles; job += run_.n_threads()) {
      const size_t h = job % kv_heads * per_kv, t = job / kv_heads * tile;
      mix_heads(l, {h, h + per_kv}, {t, std::min(t + tile, n)}, worker);
    }
  });
}

// Heads with the same keys, for some tokens of a block.
void Attention::mix_heads(size_t l, Share heads, Share tokens, int worker) {
  Scratch& own = scratch_[static_cast<size_t>(worker)];
  const size_t dim = model_.layers[l].head_dim, count = tokens.end - tokens.begin;
  const size_t begin = first_position(l, tokens.begin) / kPanel * kPanel;
  float* mixed = mixed_.x.data() + tokens.begin * mixed_.width + heads.begin * dim;
  sum_values(l, heads, tokens, {begin, end_position(tokens.end - 1)}, own.largest.data(), own.sums.data(), mixed,
             worker);
  const float* sinks = model_.layers[l].sinks;
  for (size_t row = 0; row < (heads.end - heads.begin) * count; ++row) {
    float* out = mixed + row / count * dim + row % count * mixed_.width;
    float sum = own.sums[row];
    if (sinks) sum += std::exp(sinks[heads.begin + row / count] - own.largest[row]);
    for (size_t i = 0; i < dim; ++i) out[i] /= sum;
  }
}

// All heads of one token over a thread's part of the positions, in whole panels of keys.
void Attention::mix_part(size_t l, size_t t, int worker) {
  Scratch& own = scratch_[static_cast<size_t>(worker)];
  const size_t n_heads = config_.n_heads, per_kv = n_heads / model_.layers[l].n_kv_heads;
  const size_t first = first_position(l, t) / kPanel, end = end_position(t);
  const Share panels = share_of(pieces(end, kPanel) - first, worker, run_.pool.size());
  const Share positions{(first + panels.begin) * kPanel, std::min((first + panels.end) * kPanel, end)};
  std::fill_n(&own.sums[t * n_heads], n_heads, 0.0f);
  if (positions.begin >= positions.end) return;
  for (size_t h = 0; h < n_heads; h += per_kv) {
    const size_t row = t * n_heads + h;
    float* mixed = own.mixed.data() + row * model_.layers[l].head_dim;
    sum_values(l, {h, h + per_kv}, {t, t + 1}, positions, &own.largest[row], &own.sums[row], mixed, worker);
  }
}

// The threads' parts of a softmax, each relative to its own largest score.
void Attention::merge_parts(size_t l, size_t n) {
  const size_t dim = model_.layers[l].head_dim;
  const float* sinks = model_.layers[l].sinks;
  for (size_t row = 0; row < n * config_.n_heads; ++row) {
    float largest = -std::numeric_limits<float>::infinity(), sum = 0;
    for (const Scratch& part : scratch_)
      if (part.sums[row] != 0) largest = std::max(largest, part.largest[row]);
    float* out = mixed_.x.data() + row * dim;
    std::fill(out, out + dim, 0.0f);
    for (const Scratch& part : scratch_) {
      if (part.sums[row] == 0) continue;
      const float scale = std::exp(part.largest[row] - largest);
      sum += scale * part.sums[row];
      for (size_t i = 0; i < dim; ++i) out[i] += scale * part.mixed[row * dim + i];
    }
    if (sinks) sum += std::exp(sinks[row % config_.n_heads] - largest);
    for (size_t i = 0; i < dim; ++i) out[i] /= sum;
  }
}

// Some heads with the same keys, for some tokens of the block, over some positions, as two small products.
// Row (h, t) belongs to the h-th of these heads and the t-th of the tokens; row (h, t) of `mixed` is h *
// dim + t * width away.
void Attention::sum_values(size_t l, Share heads, Share tokens, Share positions, float* largest, float* sums,
                           float* mixed, int worker) {
  const Kernels& kernels = run_.kernels;
  const Layer& layer = model_.layers[l];
  const size_t dim = layer.head_dim, width = mixed_.width;
  const size_t kv_head = heads.begin / (config_.n_heads / layer.n_kv_heads);
  const size_t count = tokens.end - tokens.begin, n_heads = heads.end - heads.begin;
  const size_t begin = positions.begin, end = positions.end, span = end - begin;
  Scratch& own = scratch_[static_cast<size_t>(worker)];
  KvCache& cache = caches_[places_[tokens.begin].slot];
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
  const float* queries = q_.data() + tokens.begin * width + heads.begin * dim;
  for (size_t j = begin; j < end; j += kPanel) {
    const uint16_t* keys = cache.keys(layer.kv_layer, kv_head, j / kPanel);
    decode(keys, dim * kPanel);
    for (size_t h = 0; h < products; ++h)
      multiply(keys, std::min(kPanel, end - j), dim, queries + h * dim, stride, false,
               scores + h * rows * span + (j - begin), span);
  }
  for (size_t row = 0; row < n_heads * count; ++row) {
    const size_t t = tokens.begin + row % count;
    const size_t low = std::max(first_position(l, t), begin) - begin;
    const size_t high = std::min(end_position(t), end) - begin;
    float* score = scores + row * span;
    soft_cap(score + low, high - low, config_.attention_softcap);
    sums[row] = kernels.softmax_numerators(score + low, high - low, largest[row]);
    std::fill(score, score + low, 0.0f);
    std::fill(score + high, score + span, 0.0f);
  }
  for (size_t i = 0; i < dim; i += kPanel) {
    const size_t columns = std::min(kPanel, dim - i);
    for (size_t j = 0; j < span; j += kPositions) {
      const size_t some = std::min(kPositions, span - j);
      const uint16_t* values = cache.values(layer.kv_layer, kv_head, i / kPanel) + (begin + j) * kPanel;
      decode(values, some * kPanel);
      for (size_t h = 0; h < products; ++h)
        multiply(values, columns, some, scores + h * rows * span + j, span, j > 0, mixed + h * dim + i, stride);
    }
  }
}

// Of decode, where the tokens of a slot share what they read.
size_t Attention::positions_read(size_t l, size_t n) const {
  size_t positions = 0;
  for (size_t t = 0, first = 0; t < n; ++t) {
    if (t + 1 < n && places_[t + 1].slot == places_[t].slot) continue;
    positions += end_position(t) - first_position(l, first);
    first = t + 1;
  }
  return positions;
}

// The first position that token t of the block attends to.
size_t Attention::first_position(size_t l, size_t t) const {
  const size_t window = model_.layers[l].sliding_window, end = end_position(t);
  return window && end > window ? end - window : 0;
}

}  // namespace fallow
