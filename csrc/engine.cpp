#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <numeric>
#include <utility>

namespace fallow {
namespace {

// Queries that attention answers at once, and cached positions that it decodes at once.
constexpr size_t kQueries = 96, kPositions = 128;
// Rows of down_proj_t that are decoded at once in prefill.
constexpr size_t kDownRows = 128;
// Rows whose planes are joined at once. Sums over rows write their result once per call: on
// Qwen2.5-1.5B decode takes 1.3 times as long with 16 as with 256, which stay in the second cache.
constexpr size_t kJoined = 256;
// Coarse rows of gate_proj after which those that matter are read whole; their first planes are then
// still in the second cache.
constexpr size_t kGateRows = 512;
// Rows of the head between which a block of tokens may be stopped: 0.1 s of Llama-3-8B's, 2.1 s in all.
constexpr size_t kHeadRows = 1 << 14;
// Rows that several tokens are multiplied with in turn where no kernel takes them together.
constexpr size_t kSharedRows = 128;

// Adds the time since the last mark to a sum.
class Clock {
 public:
  void mark(double& sum) {
    const auto now = std::chrono::steady_clock::now();
    sum += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

size_t pieces(size_t n, size_t size) { return (n + size - 1) / size; }

void add_to(float* y, const float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] += x[i];
}

float largest(const float* x, size_t n) {
  constexpr size_t lanes = 32;  // independent of each other, so that they share vectors
  float most[lanes];
  std::fill_n(most, lanes, x[0]);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (size_t j = 0; j < lanes; ++j) most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
  for (; i < n; ++i) most[0] = std::max(most[0], x[i]);
  return *std::max_element(most, most + lanes);
}

// The indices of values that are not zero; returns how many.
size_t list_rows(const float* values, Share range, int32_t* rows) {
  size_t n = 0;
  for (size_t i = range.begin; i < range.end; ++i) {
    rows[n] = static_cast<int32_t>(i);
    n += values[i] != 0;
  }
  return n;
}

float score(const Cut& cut, const float* values, size_t i) {
  return std::fabs(values[i]) * (cut.weight.empty() ? 1.0f : cut.weight[i]);
}

// Parts n rows (null: begin and following) by whether their score is above a threshold, and returns how
// many are; the others go to `coarse`.
template <class ScoreOf>
size_t part_rows(double at, const ScoreOf& score_of, const int32_t* rows, size_t begin, size_t n,
                 int32_t* fine, int32_t* coarse) {
  const float threshold = static_cast<float>(at);
  size_t above = 0;
  for (size_t i = 0; i < n; ++i) {
    const size_t row = rows ? static_cast<size_t>(rows[i]) : begin + i;
    const bool is_above = score_of(row) > threshold;
    fine[above] = coarse[i - above] = static_cast<int32_t>(row);
    above += is_above;
  }
  return above;
}

bool is_fixed(const Cut& cut) {
  return cut.by == Cut::By::kNothing || cut.by == Cut::By::kThreshold;
}

}  // namespace

Engine::Input::Input(size_t tokens, size_t w)
    : width(w), x(tokens * w) {
  const size_t few = std::min(tokens, kFew);
  d.resize(few * (w / 32));
  sum.resize(few * (w / 32));
  sum16.resize(few * (w / 16));
  high.resize(few * w);
  low.resize(few * w);
}

Activation Engine::Input::activation(size_t token) const {
  return {x.data() + token * width,          high.data() + token * width,
          low.data() + token * width,        d.data() + token * (width / 32),
          sum.data() + token * (width / 32), sum16.data() + token * (width / 16)};
}

Engine::Engine(const Packed& model, const Kernels& kernels, int n_threads, uint32_t context,
               size_t block)
    : model_(model), config_(model.config), kernels_(kernels), pool_(n_threads), context_(context),
      block_(std::min<size_t>(block, context)),
      attn_input_(block_, config_.hidden_size),
      o_input_(block_, size_t{config_.n_heads} * config_.head_dim),
      ffn_input_(block_, config_.hidden_size),
      cut_input_(block_, std::max(attn_input_.width, o_input_.width)),
      token_input_(1, config_.hidden_size) {
  const size_t hidden = config_.hidden_size, d_ff = config_.intermediate_size;
  const size_t kv = size_t{config_.n_kv_heads} * config_.head_dim;
  residual_.resize(block_ * hidden);
  branch_.resize(block_ * hidden);
  q_.resize(block_ * o_input_.width);
  k_.resize(block_ * kv);
  v_.resize(block_ * kv);
  gate_.resize(block_ * d_ff);
  if (config_.gated) up_.resize(block_ * d_ff);
  cos_.resize(block_ * config_.rotary_dim / 2);
  sin_.resize(cos_.size());
  partial_.resize(static_cast<size_t>(n_threads) * kFew * hidden);
  rows_.resize(d_ff);
  k_cache_.resize(config_.n_layers * kv * pieces(context, kPanel) * kPanel);
  v_cache_.resize(config_.n_layers * config_.n_kv_heads * pieces(config_.head_dim, kPanel) * kPanel *
                  context);
  active_.resize(config_.n_layers);
  const size_t widest = cut_input_.width;
  if (kernels.gemm_bf16) {
    for (Input* input : {&attn_input_, &o_input_, &ffn_input_, &cut_input_})
      input->half.resize(input->x.size());
    inter_half_.resize(block_ * d_ff);
  }
  const size_t panel = std::max({widest * kPanel, kDownRows * 256, kPositions * kPanel,
                                 config_.head_dim * kPanel});
  const size_t queries = std::max<size_t>(kQueries, config_.n_heads / config_.n_kv_heads);
  size_t joined = 0;
  for (const Layer& layer : model.layers)
    for (const Matrix* w : {&layer.gate_proj, &layer.up_proj, &layer.down_proj_t})
      if (w->planes) joined = std::max<size_t>(joined, kJoined * w->row_bytes);
  workers_.resize(static_cast<size_t>(n_threads));
  for (Worker& w : workers_) {
    w.selector = RowSelector(std::max(d_ff, widest));
    w.magnitudes.resize(std::max(d_ff, widest));
    w.fine.resize(d_ff);
    w.coarse.resize(d_ff);
    w.lower.resize(d_ff);
    w.outliers.resize(model.layers[0].outliers.rows);
    w.scores.resize(queries * context);
    w.sums.resize(queries);
    w.panel.resize(panel);
    w.rows.resize(std::max(widest * kPanel, size_t{2} * 256));
    if (kernels.gemm_bf16) w.panel_half.resize(panel);
    w.half.resize(config_.head_dim);
    w.joined.resize(joined);
  }
}

template <class Body>
void Engine::for_tokens(size_t n, const Body& body) {
  if (n == 1) return body(0, 0);
  pool_.run([&](int worker) {
    const Share share = share_of(n, worker, pool_.size());
    for (size_t t = share.begin; t < share.end; ++t) body(t, worker);
  });
}

// y += what the outlier neurons put out; inter_of(neuron) is their inter.
template <class InterOf>
void Engine::add_outliers(const Layer& layer, const InterOf& inter_of, float* y, int worker) {
  const Matrix& w = layer.outliers;
  if (w.rows == 0) return;
  float* inter = workers_[static_cast<size_t>(worker)].outliers.data();
  for (size_t i = 0; i < w.rows; ++i) inter[i] = inter_of(layer.outlier_neurons[i]);
  kernels_.axpy_rows[w.type](w.data, w.row_bytes, nullptr, 0, w.rows, w.cols, inter, y);
}

void Engine::set_cuts(std::vector<LayerCuts> cuts) {
  cuts_ = std::move(cuts);
  const bool coarse = std::any_of(cuts_.begin(), cuts_.end(), [](const LayerCuts& c) {
    return std::any_of(c.begin() + kGateCoarse, c.end(),
                       [](const Cut& cut) { return cut.by != Cut::By::kNothing; });
  });
  coarse_.resize(coarse ? gate_.size() : 0);
  size_t rank = 0;
  for (const LayerCuts& layer : cuts_)
    for (const Cut& cut : layer) rank = std::max(rank, cut.correction.rank);
  for (Worker& w : workers_) w.short_of.resize(rank > 0 ? rank + config_.intermediate_size : 0);
}

void Engine::set_shortlist(float nats, size_t most) {
  margin_ = model_.lm_head_coarse.data ? nats : 0;
  most_exact_ = most > 0 ? most : config_.vocab_size;
}

void Engine::set_stream(Streamer* streamer, std::vector<StreamedLayer> layers) {
  streamer_ = streamer;
  streamed_ = std::move(layers);
}

// Whether an FFN needs what is not in memory. Where only second planes are not, a few tokens under a
// plan that reads every row coarse do without.
bool Engine::reads_streamed(size_t l, size_t n) const {
  if (!streamer_ || streamed_[l].places.empty()) return false;
  if (!streamed_[l].only_rest || !as_decode(n) || is_dense()) return true;
  const auto is_coarse = [&](Tap tap) {
    return cut(l, tap).by == Cut::By::kThreshold && std::isinf(cut(l, tap).value);
  };
  return !(is_coarse(kUpCoarse) && is_coarse(kDownCoarse) &&
           (!config_.gated || is_coarse(kGateCoarse)));
}

void Engine::fetch(size_t l) {
  const uint8_t* unit = streamer_->wait(streamed_[l].unit);
  for (const auto& [place, at] : streamed_[l].places) *place = unit + at;
}

void Engine::reset_stats() {
  tokens_ = bytes_read_ = 0;
  std::fill(active_.begin(), active_.end(), 0);
  timing_ = {};
}

void Engine::forward(const int32_t* tokens, size_t n, uint32_t position, bool all, bool dense,
                     float* logits) {
  dense_ = dense;
  position_ = position;
  for (size_t start = 0, size; start < n; start += size) {
    size = std::min(block_, n - start);
    block(tokens + start, size);
    if (all) {
      head(size, true, logits + start * config_.vocab_size);
    } else if (start + size == n) {
      head(size, false, logits);
    }
  }
  tokens_ += n;
}

// x = embedding; then, layer by layer, x += attention(norm(x)) and x += ffn(norm(x)).
void Engine::block(const int32_t* tokens, size_t n) {
  Clock clock;
  turned_ = nullptr;
  const double disk = timing_.disk;
  embed(tokens, n);
  clock.mark(timing_.other);
  timing_.other -= timing_.disk - disk;
  for (size_t l = 0; l < config_.n_layers; ++l) {
    attention(l, n);
    ffn(l, n);
    pause_();
  }
  position_ += static_cast<uint32_t>(n);
}

void Engine::embed(const int32_t* tokens, size_t n) {
  const size_t hidden = config_.hidden_size;
  const Matrix& table = model_.embed_tokens;
  const uint8_t* data = embedding_ ? embedding_->data() : table.data;
  if (embedding_) slots_.resize(std::max(slots_.size(), n));
  for (size_t t = 0, fetched = 0; t < n; ++t) {
    float* x = residual_.data() + t * hidden;
    int32_t row = tokens[t];
    if (embedding_) {
      if (t == fetched) {
        Clock clock;
        const size_t more = std::min(embedding_->room(), n - t);
        embedding_->fetch(tokens + t, more, slots_.data() + t);
        fetched += more;
        clock.mark(timing_.disk);
      }
      row = slots_[t];
    }
    kernels_.decode(table.type, data + static_cast<size_t>(row) * table.row_bytes, hidden, x);
    for (size_t i = 0; i < hidden; ++i) x[i] *= config_.embedding_scale;
    if (model_.embed_positions)
      add_to(x, model_.embed_positions + (position_ + t) * hidden, hidden);
  }
}

// q, k, v = norm(x) W^T; rope; softmax(q k^T) v W_o^T.
void Engine::attention(size_t l, size_t n) {
  const Layer& layer = model_.layers[l];
  Clock clock;
  normalize_into(layer.attn_norm, n, attn_input_);
  clock.mark(timing_.other);
  project(l, attn_input_, n,
          {{layer.q_proj, layer.q_bias, q_.data(), kQInput},
           {layer.k_proj, layer.k_bias, k_.data(), kKInput},
           {layer.v_proj, layer.v_bias, v_.data(), kVInput}});
  clock.mark(timing_.attention_proj);
  rotate(layer, layer.q_norm, config_.n_heads, n, q_.data());
  rotate(layer, layer.k_norm, config_.n_kv_heads, n, k_.data());
  store_cache(l, n);
  attend(l, n);
  clock.mark(timing_.attention);
  prepare(o_input_, n);
  project(l, o_input_, n, {{layer.o_proj, layer.o_bias, branch_.data(), kOInput}});
  clock.mark(timing_.attention_proj);
  add_branch(layer.attn_post_norm, n);
  clock.mark(timing_.other);
}

// Norm of q or k if the model has one, then rotary embedding of its leading dimensions: dimension i
// turns with i + rotary_dim / 2.
void Engine::rotate(const Layer& layer, const Norm& norm, size_t heads, size_t n, float* x) {
  const size_t dim = config_.head_dim, half = config_.rotary_dim / 2;
  if (half > 0 && turned_ != layer.inv_freq) {
    for (size_t t = 0; t < n; ++t)
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(position_ + t) * layer.inv_freq[i];
        cos_[t * half + i] = std::cos(angle) * config_.rope_scale;
        sin_[t * half + i] = std::sin(angle) * config_.rope_scale;
      }
    turned_ = layer.inv_freq;
  }
  for_tokens(n, [&](size_t t, int) {
    const float *c = cos_.data() + t * half, *s = sin_.data() + t * half;
    for (size_t h = 0; h < heads; ++h) {
      float* head = x + (t * heads + h) * dim;
      if (norm.weight) normalize(norm, head, dim, head);
      for (size_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * c[i] - b * s[i];
        head[i + half] = b * c[i] + a * s[i];
      }
    }
  });
}

void Engine::store_cache(size_t l, size_t n) {
  const size_t dim = config_.head_dim, heads = config_.n_kv_heads;
  uint16_t* half = workers_[0].half.data();
  for (size_t t = 0; t < n; ++t)
    for (size_t h = 0; h < heads; ++h) {
      const size_t position = position_ + t;
      kernels_.to_f16(k_.data() + (t * heads + h) * dim, dim, half);
      uint16_t* key = keys(l, h, position / kPanel) + position % kPanel;
      for (size_t i = 0; i < dim; ++i) key[i * kPanel] = half[i];
      kernels_.to_f16(v_.data() + (t * heads + h) * dim, dim, half);
      for (size_t i = 0; i < dim; i += kPanel) {
        const size_t columns = std::min(kPanel, dim - i);
        std::copy_n(half + i, columns, values(l, h, i / kPanel) + position * kPanel);
      }
    }
}

// A panel of keys, (head_dim, kPanel), of one kv head.
uint16_t* Engine::keys(size_t l, size_t kv_head, size_t panel) {
  const size_t panels = pieces(context_, kPanel);
  const size_t before = (l * config_.n_kv_heads + kv_head) * panels + panel;
  return k_cache_.data() + before * config_.head_dim * kPanel;
}

// A panel of columns of the values of one kv head, (context, kPanel).
uint16_t* Engine::values(size_t l, size_t kv_head, size_t panel) {
  const size_t panels = pieces(config_.head_dim, kPanel);
  const size_t before = (l * config_.n_kv_heads + kv_head) * panels + panel;
  return v_cache_.data() + before * context_ * kPanel;
}

// Work is cut into heads that share keys and values, and tiles of tokens. One token's heads go to
// the threads in equal parts; of a block, tiles do, in turn, since late ones see more positions.
void Engine::attend(size_t l, size_t n) {
  const size_t kv_heads = config_.n_kv_heads, per_kv = config_.n_heads / kv_heads;
  pool_.run([&](int worker) {
    if (as_decode(n)) {
      const Share share = share_of(config_.n_heads, worker, pool_.size());
      for (size_t h = share.begin; h < share.end;) {
        const size_t end = std::min((h / per_kv + 1) * per_kv, share.end);
        for (size_t t = 0; t < n; ++t) attend_heads(l, {h, end}, {t, t + 1}, worker);
        h = end;
      }
      return;
    }
    const size_t tile = std::max<size_t>(kQueries / per_kv, 1), tiles = pieces(n, tile);
    for (size_t job = static_cast<size_t>(worker); job < kv_heads * tiles;
         job += static_cast<size_t>(pool_.size())) {
      const size_t h = job % kv_heads * per_kv, t = job / kv_heads * tile;
      attend_heads(l, {h, h + per_kv}, {t, std::min(t + tile, n)}, worker);
    }
  });
  if (as_decode(n)) {
    const size_t positions = position_ + n - first_position(l, 0);
    bytes_read_ += positions * kv_heads * config_.head_dim * 2 * sizeof(uint16_t);
  }
}

// softmax(q k^T) v of some heads with the same keys, for some tokens of the block, as two small
// products; row (h, t) of the scores belongs to the h-th of these heads and the t-th of the tokens.
void Engine::attend_heads(size_t l, Share heads, Share tokens, int worker) {
  const size_t dim = config_.head_dim, width = o_input_.width;
  const size_t kv_head = heads.begin / (config_.n_heads / config_.n_kv_heads);
  const size_t count = tokens.end - tokens.begin, n_heads = heads.end - heads.begin;
  const size_t end = position_ + tokens.end;
  const size_t begin = first_position(l, tokens.begin) / kPanel * kPanel, span = end - begin;
  Worker& w = workers_[static_cast<size_t>(worker)];
  float *scores = w.scores.data(), *panel = w.panel.data();
  const auto decode = [&](const uint16_t* half, size_t size) {
    kernels_.decode(kF16, reinterpret_cast<const uint8_t*>(half), size, panel);
  };
  // The queries lie dim apart where there is one token, otherwise one product per head is needed.
  const size_t products = count == 1 ? 1 : n_heads;
  const size_t rows = count == 1 ? n_heads : count, stride = count == 1 ? dim : width;
  const size_t first = tokens.begin * width + heads.begin * dim;
  for (size_t j = begin; j < end; j += kPanel) {
    decode(keys(l, kv_head, j / kPanel), dim * kPanel);
    for (size_t h = 0; h < products; ++h)
      kernels_.gemm_f32(panel, std::min(kPanel, end - j), dim, q_.data() + first + h * dim, stride,
                        rows, false, scores + h * rows * span + (j - begin), span);
  }
  for (size_t row = 0; row < n_heads * count; ++row) {
    const size_t t = tokens.begin + row % count;
    const size_t low = first_position(l, t) - begin, high = position_ + t + 1 - begin;
    float* score = scores + row * span;
    for (size_t j = low; j < high; ++j) score[j] *= config_.attention_scale;
    w.sums[row] = kernels_.softmax_numerators(score + low, high - low);
    std::fill(score, score + low, 0.0f);
    std::fill(score + high, score + span, 0.0f);
  }
  for (size_t i = 0; i < dim; i += kPanel) {
    const size_t columns = std::min(kPanel, dim - i);
    for (size_t j = 0; j < span; j += kPositions) {
      const size_t positions = std::min(kPositions, span - j);
      decode(values(l, kv_head, i / kPanel) + (begin + j) * kPanel, positions * kPanel);
      for (size_t h = 0; h < products; ++h)
        kernels_.gemm_f32(panel, columns, positions, scores + h * rows * span + j, span, rows,
                          j > 0, o_input_.x.data() + first + h * dim + i, stride);
    }
  }
  for (size_t row = 0; row < n_heads * count; ++row) {
    float* out = o_input_.x.data() + first + row / count * dim + row % count * width;
    for (size_t i = 0; i < dim; ++i) out[i] /= w.sums[row];
  }
}

// The first position that token t of the block attends to.
size_t Engine::first_position(size_t l, size_t t) const {
  const size_t window = model_.layers[l].sliding_window, end = position_ + t + 1;
  return window && end > window ? end - window : 0;
}

// inter = act(x W_gate^T) * (x W_up^T); out = inter W_down^T, a sum of rows of down_proj_t.
void Engine::ffn(size_t l, size_t n) {
  const Layer& layer = model_.layers[l];
  Clock clock;
  Input& input = config_.parallel ? attn_input_ : ffn_input_;
  if (!config_.parallel) normalize_into(layer.ffn_norm, n, input);
  clock.mark(timing_.other);
  const bool streams = reads_streamed(l, n);
  if (streams) {
    fetch(l);
    clock.mark(timing_.disk);
  }
  const double selecting = timing_.select;
  const size_t hidden = config_.hidden_size;
  if (!as_decode(n)) {
    ffn_block(l, n, input);
  } else if (n > 1 && is_dense()) {
    ffn_few(l, n, input);
  } else {
    // The first token last: what comes out lies in its place.
    for (size_t t = n; t-- > 1;) {
      std::copy_n(input.x.data() + t * hidden, hidden, token_input_.x.data());
      prepare(token_input_, 1);
      ffn_token(l, token_input_);
      std::copy_n(branch_.data(), hidden, branch_.data() + t * hidden);
    }
    ffn_token(l, input);
  }
  for_tokens(n, [&](size_t t, int worker) {
    float* y = branch_.data() + t * hidden;
    if (layer.down_bias) add_to(y, layer.down_bias, hidden);
    apply(cut(l, kFfnOut), y, hidden, worker);
  });
  if (streams) streamer_->done();
  clock.mark(timing_.ffn);
  timing_.ffn -= timing_.select - selecting;
  add_branch(layer.ffn_post_norm, n);
  clock.mark(timing_.other);
}

// The first token of `input`.
void Engine::ffn_token(size_t l, Input& input) {
  if (has_cut(l, {kGateInput, kUpInput, kGatePre, kUp, kDownInput}) || !is_fixed(cut(l, kGateAct)) ||
      !is_fixed(cut(l, kInter))) {
    ffn_sparse_one(l, input);
  } else {
    ffn_one(l, input);
  }
}

// Every thread takes a range of neurons from gate_proj to its own sum of down_proj_t rows, and waits
// for no other: a neuron whose gate_act or inter stays below a fixed threshold has its remaining
// rows not read.
void Engine::ffn_one(size_t l, const Input& input) {
  const Layer& layer = model_.layers[l];
  const size_t hidden = config_.hidden_size, d_ff = config_.intermediate_size;
  const Activation x = input.activation();
  pool_.run([&](int worker) {
    const auto [begin, end] = share_of(d_ff, worker, pool_.size());
    const Share range{begin, end};
    Worker& own = workers_[static_cast<size_t>(worker)];
    float *act = gate_.data(), *y = partial_.data() + static_cast<size_t>(worker) * kFew * hidden;
    size_t n = end - begin;
    const Matrix& first = config_.gated ? layer.gate_proj : layer.up_proj;
    const float* bias = config_.gated ? layer.gate_bias : layer.up_bias;
    own.bytes = 0;
    if (gate_is_coarse(l)) {
      gate_from_planes(l, x, range, worker);
    } else {
      gemv(first, nullptr, begin, n, x, act + begin, worker);
      own.bytes += n * first.read_bytes();
      if (bias) add_to(act + begin, bias + begin, n);
      activate(act + begin, n);
    }
    const int32_t* rows = nullptr;  // all of the range
    const auto cut_by = [&](const Cut& cut) {
      if (cut.by == Cut::By::kNothing) return;
      n = keep_above(cut, act, range, rows_.data() + begin);
      rows = rows_.data() + begin;
    };
    cut_by(cut(l, kGateAct));
    // Calls use(matrix, rows, n) with the rows that are read whole and with those read coarse.
    const auto in_parts = [&](const Matrix& w, Tap tap, const auto& use) {
      if (cut(l, tap).by == Cut::By::kNothing || !w.planes) {
        use(w, rows, n);
      } else {
        const Cut& by = cut(l, tap);
        const size_t fine =
            part_rows(by.value, [&](size_t row) { return score(by, act, row); }, rows, begin, n,
                      own.fine.data(), own.coarse.data());
        use(w, own.fine.data(), fine);
        use(w.coarse(), own.coarse.data(), n - fine);
      }
    };
    if (config_.gated) {
      const Correction& correction = cut(l, kUpCoarse).correction;
      const float* short_of =
          layer.up_proj.planes ? corrected(correction, x.x, range, worker) : nullptr;
      if (short_of && worker == 0) own.bytes += correction.bytes();
      in_parts(layer.up_proj, kUpCoarse, [&](const Matrix& w, const int32_t* some, size_t count) {
        float* up = up_.data() + begin;
        gemv(w, some, begin, count, x, up, worker);
        own.bytes += count * w.read_bytes();
        if (short_of && w.is_coarse())
          for (size_t i = 0; i < count; ++i) up[i] += short_of[some[i]];
        if (!some) {
          if (layer.up_bias) add_to(up, layer.up_bias + begin, count);
          for (size_t i = 0; i < count; ++i) act[begin + i] *= up[i];
        } else {
          for (size_t i = 0; i < count; ++i)
            act[some[i]] *= up[i] + (layer.up_bias ? layer.up_bias[some[i]] : 0.0f);
        }
      });
    }
    cut_by(cut(l, kInter));
    own.active = n;
    std::fill(y, y + hidden, 0.0f);
    in_parts(layer.down_proj_t, kDownCoarse,
             [&](const Matrix& w, const int32_t* some, size_t count) {
               const float* inter = act + begin;
               if (some) {
                 for (size_t i = 0; i < count; ++i) own.magnitudes[i] = act[some[i]];
                 inter = own.magnitudes.data();
               }
               axpy(w, some, begin, count, inter, y, worker);
               own.bytes += count * w.read_bytes();
             });
  });
  sum_partials(1);
  add_outliers(layer, [&](size_t neuron) { return gate_[neuron]; }, branch_.data(), 0);
  for (Worker& w : workers_) {
    active_[l] += std::exchange(w.active, 0);
    bytes_read_ += w.bytes;
  }
  bytes_read_ += layer.outliers.bytes();
}

// As ffn_one without cuts, for at most kFew tokens that share the rows.
void Engine::ffn_few(size_t l, size_t n, const Input& input) {
  const Layer& layer = model_.layers[l];
  const size_t hidden = config_.hidden_size, d_ff = config_.intermediate_size;
  pool_.run([&](int worker) {
    const auto [begin, end] = share_of(d_ff, worker, pool_.size());
    const size_t count = end - begin;
    float *act = gate_.data() + begin, *up = up_.data() + begin;
    float* y = partial_.data() + static_cast<size_t>(worker) * kFew * hidden;
    gemv_tokens(config_.gated ? layer.gate_proj : layer.up_proj, begin, count, input, n, act, d_ff,
                worker);
    if (config_.gated) gemv_tokens(layer.up_proj, begin, count, input, n, up, d_ff, worker);
    const float* bias = config_.gated ? layer.gate_bias : layer.up_bias;
    for (size_t t = 0; t < n; ++t, act += d_ff, up += d_ff) {
      if (bias) add_to(act, bias + begin, count);
      activate(act, count);
      if (!config_.gated) continue;
      if (layer.up_bias) add_to(up, layer.up_bias + begin, count);
      for (size_t i = 0; i < count; ++i) act[i] *= up[i];
    }
    std::fill(y, y + n * hidden, 0.0f);
    axpy_tokens(layer.down_proj_t, begin, count, gate_.data() + begin, d_ff, n, y, hidden, worker);
  });
  sum_partials(n);
  for (size_t t = 0; t < n; ++t)
    add_outliers(layer, [&](size_t neuron) { return gate_[t * d_ff + neuron]; },
                 branch_.data() + t * hidden, 0);
  active_[l] += n * d_ff;
  if (config_.gated) bytes_read_ += layer.gate_proj.bytes();
  bytes_read_ += layer.up_proj.bytes() + layer.down_proj_t.bytes() + layer.outliers.bytes();
}

bool Engine::gate_is_coarse(size_t l) const {
  return model_.layers[l].gate_proj.planes && has_cut(l, {kGateCoarse});
}

// What coarse rows of a range of neurons are short of for the input x (hidden,); null: nothing. Entry i
// belongs to neuron i.
const float* Engine::corrected(const Correction& correction, const float* x, Share range,
                               int worker) {
  if (correction.rank == 0) return nullptr;
  const size_t hidden = config_.hidden_size, d_ff = config_.intermediate_size;
  const size_t rank = correction.rank, row_bytes = correction.out.size() / rank;
  float *factors = workers_[static_cast<size_t>(worker)].short_of.data(), *found = factors + rank;
  const Activation only_floats{x, nullptr, nullptr, nullptr, nullptr, nullptr};
  kernels_.gemv_rows[kF16](correction.in.data(), 2 * hidden, nullptr, 0, rank, hidden, only_floats,
                           factors);
  // Whole blocks, of which the first and the last may reach beyond the range.
  const size_t first = range.begin / 32 * 32, last = std::min(pieces(range.end, 32) * 32, d_ff);
  std::fill(found + first, found + last, 0.0f);
  kernels_.axpy_rows[correction.out_type](correction.out.data() + row_bytes * first / d_ff, row_bytes,
                                          nullptr, 0, rank, last - first, factors, found + first);
  return found;
}

// gate_act of neurons [begin, begin + n) from gate_pre of coarse rows, in place. Scores are by how much
// it may be off: its change to both sides when gate_pre changes by the error, times the weight.
void Engine::activate_coarse(const Cut& cut, size_t begin, size_t n, float* values, float* scores,
                             int worker) {
  float* lower = workers_[static_cast<size_t>(worker)].lower.data();
  const float *error = cut.error.data() + begin, *weight = cut.weight.data() + begin;
  for (size_t i = 0; i < n; ++i) {
    scores[i] = values[i] + error[i];
    lower[i] = values[i] - error[i];
  }
  activate(scores, n);
  activate(lower, n);
  activate(values, n);
  for (size_t i = 0; i < n; ++i)
    scores[i] = (std::fabs(scores[i] - values[i]) + std::fabs(values[i] - lower[i])) * weight[i];
}

// gate_act of a range of neurons, from coarse rows; where these put the score above the threshold, from
// whole ones.
void Engine::gate_from_planes(size_t l, const Activation& x, Share range, int worker) {
  const Layer& layer = model_.layers[l];
  const Matrix &whole = layer.gate_proj, coarse = whole.coarse();
  Worker& own = workers_[static_cast<size_t>(worker)];
  const Cut& by = cut(l, kGateCoarse);
  const float* short_of = corrected(by.correction, x.x, range, worker);
  if (worker == 0) own.bytes += by.correction.bytes();
  // One after the other in the same place.
  float *act = gate_.data(), *scores = own.magnitudes.data(), *again = own.magnitudes.data();
  for (size_t begin = range.begin; begin < range.end; begin += kGateRows) {
    const size_t n = std::min(kGateRows, range.end - begin);
    gemv(coarse, nullptr, begin, n, x, act + begin, worker);
    if (layer.gate_bias) add_to(act + begin, layer.gate_bias + begin, n);
    if (short_of) add_to(act + begin, short_of + begin, n);
    activate_coarse(by, begin, n, act + begin, scores, worker);
    const int32_t* fine = own.fine.data();
    const size_t above =
        part_rows(by.value, [&](size_t row) { return scores[row - begin]; }, nullptr, begin, n,
                  own.fine.data(), own.coarse.data());
    gemv(whole, fine, 0, above, x, again, worker);
    if (layer.gate_bias)
      for (size_t i = 0; i < above; ++i) again[i] += layer.gate_bias[fine[i]];
    activate(again, above);
    for (size_t i = 0; i < above; ++i) act[fine[i]] = again[i];
    own.bytes += n * coarse.read_bytes() + above * (whole.read_bytes() - coarse.read_bytes());
  }
}

// Columns [column, column + n) of a row, whole blocks: in place, or joined in `scratch`.
const uint8_t* Engine::row_part(const Matrix& w, size_t row, size_t column, size_t n,
                                uint8_t* scratch) const {
  if (!w.planes) return w.data + row * w.row_bytes + w.row_bytes * column / w.cols;
  const PlaneFormat& f = *w.planes;
  const size_t first = row * w.blocks() + column / f.block;
  kernels_.join(f, w.data + first * f.base_bytes(),
                w.rest ? w.rest + first * f.rest_bytes() : nullptr, coarse_fill(row, w.summed), n / f.block,
                scratch);
  return scratch;
}

// Calls use(data, rows, begin, first, n) for the rows' bytes: once with where they lie, or, for a
// matrix in planes, for some rows at a time with where they were joined. `first` counts rows done.
template <class Use>
void Engine::for_rows(const Matrix& w, const int32_t* rows, size_t begin, size_t n, int worker,
                      const Use& use) {
  if (!w.planes) return use(w.data, rows, begin, size_t{0}, n);
  uint8_t* joined = workers_[static_cast<size_t>(worker)].joined.data();
  for (size_t first = 0; first < n; first += kJoined) {
    const size_t some = std::min(kJoined, n - first);
    for (size_t i = 0; i < some; ++i)
      row_part(w, rows ? static_cast<size_t>(rows[first + i]) : begin + first + i, 0, w.cols,
               joined + i * w.row_bytes);
    use(joined, nullptr, size_t{0}, first, some);
  }
}

void Engine::gemv(const Matrix& w, const int32_t* rows, size_t begin, size_t n, const Activation& x,
                  float* y, int worker) {
  if (const GemvPlanes planes = kernels_.gemv_planes[w.type]; w.planes && planes)
    return planes(w.data, w.rest, rows, begin, n, w.cols, x, y);
  for_rows(w, rows, begin, n, worker,
           [&](const uint8_t* data, const int32_t* list, size_t from, size_t first, size_t some) {
             kernels_.gemv_rows[w.type](data, w.row_bytes, list, from, some, w.cols, x, y + first);
           });
}

void Engine::axpy(const Matrix& w, const int32_t* rows, size_t begin, size_t n,
                  const float* coefficient, float* y, int worker) {
  if (const AxpyPlanes planes = kernels_.axpy_planes[w.type]; w.planes && planes)
    return planes(w.data, w.rest, rows, begin, n, w.cols, coefficient, y);
  for_rows(w, rows, begin, n, worker,
           [&](const uint8_t* data, const int32_t* list, size_t from, size_t first, size_t some) {
             kernels_.axpy_rows[w.type](data, w.row_bytes, list, from, some, w.cols,
                                        coefficient + first, y);
           });
}

// y[t * stride + i] = W[begin + i] . x_t
void Engine::gemv_tokens(const Matrix& w, size_t begin, size_t n, const Input& input, size_t tokens,
                         float* y, size_t stride, int worker) {
  Activation x[kFew];
  for (size_t t = 0; t < tokens; ++t) x[t] = input.activation(t);
  if (const GemvTokens together = kernels_.gemv_tokens[w.type]; together && !w.planes)
    return together(w.data, w.row_bytes, begin, n, w.cols, x, tokens, y, stride);
  for (size_t i = 0; i < n; i += kSharedRows)
    for (size_t t = 0; t < tokens; ++t)
      gemv(w, nullptr, begin + i, std::min(kSharedRows, n - i), x[t], y + t * stride + i, worker);
}

// y[t * stride + j] += sum over i of coefficient[t * from + i] * W[begin + i][j]
void Engine::axpy_tokens(const Matrix& w, size_t begin, size_t n, const float* coefficient,
                         size_t from, size_t tokens, float* y, size_t stride, int worker) {
  if (const AxpyTokens together = kernels_.axpy_tokens[w.type]; together && !w.planes)
    return together(w.data, w.row_bytes, begin, n, w.cols, coefficient, from, tokens, y, stride);
  for (size_t t = 0; t < tokens; ++t)
    axpy(w, nullptr, begin, n, coefficient + t * from, y + t * stride, worker);
}

// Sets those of a range of values to zero that a fixed threshold cuts, and lists the others' indices.
size_t Engine::keep_above(const Cut& cut, float* values, Share range, int32_t* rows) {
  const float threshold = static_cast<float>(cut.value);
  const float* weight = cut.weight.data();
  if (cut.weight.empty()) {
    for (size_t i = range.begin; i < range.end; ++i)
      values[i] = std::fabs(values[i]) <= threshold ? 0.0f : values[i];
  } else {
    for (size_t i = range.begin; i < range.end; ++i)
      values[i] = std::fabs(values[i]) * weight[i] <= threshold ? 0.0f : values[i];
  }
  return list_rows(values, range, rows);
}

// As ffn_one, for the cuts that need all of a token's values: threads meet at each of them.
void Engine::ffn_sparse_one(size_t l, Input& input) {
  const Layer& layer = model_.layers[l];
  const size_t hidden = config_.hidden_size, d_ff = config_.intermediate_size;
  float *gate = gate_.data(), *up = up_.data();
  if (config_.gated) {
    project(l, input, 1, {{layer.gate_proj, layer.gate_bias, gate, kGateInput}});
  } else {
    project(l, input, 1, {{layer.up_proj, layer.up_bias, gate, kUpInput}});
  }
  Clock clock;
  apply(cut(l, kGatePre), gate, d_ff, 0);
  activate(gate, d_ff);
  apply(cut(l, kGateAct), gate, d_ff, 0);
  const bool late = has_cut(l, {kUp, kInter, kDownInput});
  if (has_cut(l, {kGatePre, kGateAct})) {
    collect_rows(gate);
  } else {
    std::iota(rows_.begin(), rows_.end(), 0);
    n_rows_ = d_ff;
  }
  clock.mark(timing_.select);

  const Input* up_input = &input;
  if (config_.gated && has_cut(l, {kUpInput})) {
    std::copy_n(input.x.begin(), hidden, cut_input_.x.begin());
    cut_input_.width = hidden;
    apply(cut(l, kUpInput), cut_input_.x.data(), hidden, 0);
    prepare(cut_input_, 1);
    up_input = &cut_input_;
  }
  const Activation x = up_input->activation();
  // inter of the rows that are left, compact: compact[i] belongs to neuron rows_[i].
  float* compact = config_.gated ? up : workers_[0].magnitudes.data();
  const auto finish_rows = [&](Share share, int worker) {
    const size_t n = share.end - share.begin;
    const int32_t* rows = rows_.data() + share.begin;
    float* inter = compact + share.begin;
    if (config_.gated) {
      gemv(layer.up_proj, rows, 0, n, x, inter, worker);
      for (size_t i = 0; i < n; ++i) {
        const auto row = static_cast<size_t>(rows[i]);
        inter[i] = gate[row] * (inter[i] + (layer.up_bias ? layer.up_bias[row] : 0.0f));
      }
    } else {
      for (size_t i = 0; i < n; ++i) inter[i] = gate[rows[i]];
    }
    return inter;
  };
  const auto sum_rows = [&](Share share, const float* inter, int worker) {
    float* y = partial_.data() + static_cast<size_t>(worker) * kFew * hidden;
    std::fill(y, y + hidden, 0.0f);
    axpy(layer.down_proj_t, rows_.data() + share.begin, 0, share.end - share.begin, inter, y,
         worker);
  };
  if (config_.gated) bytes_read_ += n_rows_ * layer.up_proj.row_bytes;
  if (!late) {
    pool_.run([&](int worker) {
      const Share share = share_of(n_rows_, worker, pool_.size());
      sum_rows(share, finish_rows(share, worker), worker);
    });
  } else {
    if (config_.gated) {
      pool_.run([&](int worker) {
        const Share share = share_of(n_rows_, worker, pool_.size());
        if (!has_cut(l, {kUp})) {
          finish_rows(share, worker);
          return;
        }
        const int32_t* rows = rows_.data() + share.begin;
        float* values = up + share.begin;
        gemv(layer.up_proj, rows, 0, share.end - share.begin, x, values, worker);
        if (layer.up_bias)
          for (size_t i = 0; i < share.end - share.begin; ++i) values[i] += layer.up_bias[rows[i]];
      });
      // Back to one value per neuron, from the last one on since up is compact at its front.
      for (size_t i = n_rows_, at = d_ff; at-- > 0;)
        up[at] = i > 0 && static_cast<size_t>(rows_[i - 1]) == at ? up[--i] : 0.0f;
      if (has_cut(l, {kUp})) {
        apply(cut(l, kUp), up, d_ff, 0);
        for (size_t i = 0; i < d_ff; ++i) up[i] *= gate[i];
      }
      std::swap(gate, up);
    }
    clock = Clock();
    apply(cut(l, kInter), gate, d_ff, 0);
    apply(cut(l, kDownInput), gate, d_ff, 0);
    collect_rows(gate);
    for (size_t i = 0; i < n_rows_; ++i) gate[i] = gate[rows_[i]];
    compact = gate;
    clock.mark(timing_.select);
    pool_.run([&](int worker) {
      const Share share = share_of(n_rows_, worker, pool_.size());
      sum_rows(share, gate + share.begin, worker);
    });
  }
  sum_partials(1);
  add_outliers(layer, [&](size_t neuron) {
    const auto end = rows_.begin() + static_cast<std::ptrdiff_t>(n_rows_);
    const auto at = std::lower_bound(rows_.begin(), end, static_cast<int32_t>(neuron));
    return at != end && static_cast<size_t>(*at) == neuron ? compact[at - rows_.begin()] : 0.0f;
  }, branch_.data(), 0);
  active_[l] += n_rows_;
  bytes_read_ += n_rows_ * layer.down_proj_t.row_bytes + layer.outliers.bytes();
}

// The threads' sums of down_proj_t rows for n tokens, in the order of the threads.
void Engine::sum_partials(size_t n) {
  const size_t hidden = config_.hidden_size;
  for (size_t i = 0; i < n * hidden; ++i) {
    float sum = 0;
    for (size_t w = 0; w < workers_.size(); ++w) sum += partial_[w * kFew * hidden + i];
    branch_[i] = sum;
  }
}

// Prefill is dense: some token of a block needs nearly every neuron. Cuts are applied as masks.
void Engine::ffn_block(size_t l, size_t n, Input& input) {
  const Layer& layer = model_.layers[l];
  const size_t d_ff = config_.intermediate_size;
  if (config_.gated) {
    project(l, input, n,
            {{layer.gate_proj, layer.gate_bias, gate_.data(), kGateInput},
             {layer.up_proj, layer.up_bias, up_.data(), kUpInput}});
  } else {
    project(l, input, n, {{layer.up_proj, layer.up_bias, gate_.data(), kUpInput}});
  }
  // Whole and coarse products are made of all rows, and each neuron takes one.
  const bool gate_coarse = gate_is_coarse(l);
  if (gate_coarse) {
    const Cut& by = cut(l, kGateCoarse);
    project(l, input, n,
            {{layer.gate_proj.coarse(), layer.gate_bias, coarse_.data(), kGateInput}});
    correct(by.correction, n, input);
    for_tokens(n, [&](size_t t, int worker) {
      float *act = gate_.data() + t * d_ff, *coarse = coarse_.data() + t * d_ff;
      float* scores = workers_[static_cast<size_t>(worker)].magnitudes.data();
      activate(act, d_ff);
      activate_coarse(by, 0, d_ff, coarse, scores, worker);
      for (size_t i = 0; i < d_ff; ++i)
        if (scores[i] <= static_cast<float>(by.value)) act[i] = coarse[i];
    });
  }
  const bool up_coarse = config_.gated && layer.up_proj.planes && has_cut(l, {kUpCoarse});
  const bool down_coarse = layer.down_proj_t.planes && has_cut(l, {kDownCoarse});
  if (up_coarse) {
    const Matrix w = layer.up_proj.coarse();
    project(l, input, n, {{w, layer.up_bias, coarse_.data(), kUpInput}});
    correct(cut(l, kUpCoarse).correction, n, input);
  }
  for_tokens(n, [&](size_t t, int worker) {
    float *inter = gate_.data() + t * d_ff, *coarse = coarse_.data() + t * d_ff;
    if (!gate_coarse) {
      apply(cut(l, kGatePre), inter, d_ff, worker);
      activate(inter, d_ff);
    }
    apply(cut(l, kGateAct), inter, d_ff, worker);
    if (config_.gated) {
      float* up = up_.data() + t * d_ff;
      if (up_coarse) {
        const Cut& by = cut(l, kUpCoarse);
        for (size_t i = 0; i < d_ff; ++i)
          if (score(by, inter, i) <= static_cast<float>(by.value)) up[i] = coarse[i];
      }
      apply(cut(l, kUp), up, d_ff, worker);
      for (size_t i = 0; i < d_ff; ++i) inter[i] *= up[i];
    }
    apply(cut(l, kInter), inter, d_ff, worker);
    apply(cut(l, kDownInput), inter, d_ff, worker);
    const auto count = static_cast<uint64_t>(std::count_if(
        inter, inter + d_ff, [](float v) { return v != 0; }));
    workers_[static_cast<size_t>(worker)].active += is_dense() ? d_ff : count;
    if (down_coarse) {
      const Cut& by = cut(l, kDownCoarse);
      for (size_t i = 0; i < d_ff; ++i) {
        const bool is_coarse = score(by, inter, i) <= static_cast<float>(by.value);
        coarse[i] = is_coarse ? inter[i] : 0.0f;
        if (is_coarse) inter[i] = 0;
      }
    }
  });
  for (Worker& w : workers_) active_[l] += std::exchange(w.active, 0);
  down_block(layer.down_proj_t, n, gate_.data(), false);
  if (down_coarse) down_block(layer.down_proj_t.coarse(), n, coarse_.data(), true);
  for_tokens(n, [&](size_t t, int worker) {
    const size_t start = t * d_ff;
    add_outliers(layer, [&](size_t neuron) {
      return gate_[start + neuron] + (down_coarse ? coarse_[start + neuron] : 0.0f);
    }, branch_.data() + t * config_.hidden_size, worker);
  });
}

// Adds to coarse_ (T, d_ff) what it is short of.
void Engine::correct(const Correction& correction, size_t n, const Input& input) {
  const size_t d_ff = config_.intermediate_size;
  for_tokens(n, [&](size_t t, int worker) {
    const float* x = input.x.data() + t * input.width;
    if (const float* short_of = corrected(correction, x, {0, d_ff}, worker))
      add_to(coarse_.data() + t * d_ff, short_of, d_ff);
  });
}

// branch (T, hidden) (+)= inter (T, d_ff) down_proj_t (d_ff, hidden). Every thread takes some
// columns, decodes them for a few rows at a time, and adds their part for all tokens.
void Engine::down_block(const Matrix& w, size_t n, const float* inter, bool add) {
  const size_t hidden = config_.hidden_size, d_ff = config_.intermediate_size;
  const size_t unit = hidden % 256 == 0 ? 256 : 32;  // columns; whole blocks of any format
  const bool half = uses_bf16(w, d_ff);
  if (half)
    for_tokens(n, [&](size_t t, int) {
      kernels_.to_bf16(inter + t * d_ff, d_ff, inter_half_.data() + t * d_ff);
    });
  pool_.run([&](int worker) {
    Worker& scratch = workers_[static_cast<size_t>(worker)];
    float *first = scratch.rows.data(), *second = first + 256, *panel = scratch.panel.data();
    uint16_t* panel_half = scratch.panel_half.data();
    const Share share = share_of(pieces(hidden, unit), worker, pool_.size());
    for (size_t u = share.begin; u < share.end; ++u) {
      const size_t column = u * unit, width = std::min(unit, hidden - column);
      const auto row_at = [&](size_t row) {
        return row_part(w, row, column, width, scratch.joined.data());
      };
      // The panel of columns [c, c + kPanel) starts at c * kDownRows.
      for (size_t row = 0; row < d_ff; row += kDownRows) {
        const size_t rows = std::min(kDownRows, d_ff - row);
        for (size_t r = 0; r < rows; r += half ? 2 : 1) {
          kernels_.decode(w.type, row_at(row + r), width, first);
          if (half) kernels_.decode(w.type, row_at(row + r + 1), width, second);
          for (size_t c = 0; c < width; c += kPanel) {
            const size_t there = std::min(kPanel, width - c), to = c * kDownRows + r * kPanel;
            if (half) {
              kernels_.pair_bf16(first + c, second + c, there, panel_half + to);
            } else {
              std::copy_n(first + c, there, panel + to);
            }
          }
        }
        for (size_t c = 0; c < width; c += kPanel) {
          const size_t there = std::min(kPanel, width - c);
          float* y = branch_.data() + column + c;
          if (half) {
            kernels_.gemm_bf16(panel_half + c * kDownRows, there, rows, inter_half_.data() + row,
                               d_ff, n, add || row > 0, y, hidden);
          } else {
            kernels_.gemm_f32(panel + c * kDownRows, there, rows, inter + row, d_ff, n,
                              add || row > 0, y, hidden);
          }
        }
      }
    }
  });
}

// residual += norm(branch)
void Engine::add_branch(const Norm& post_norm, size_t n) {
  const size_t hidden = config_.hidden_size;
  for_tokens(n, [&](size_t t, int) {
    float* y = branch_.data() + t * hidden;
    if (post_norm.weight) normalize(post_norm, y, hidden, y);
    add_to(residual_.data() + t * hidden, y, hidden);
  });
}

void Engine::head(size_t n, bool all, float* logits) {
  Clock clock;
  const double disk = timing_.disk;
  const size_t hidden = config_.hidden_size, first = all ? 0 : n - 1, count = n - first;
  if (first > 0)
    std::copy_n(residual_.begin() + static_cast<std::ptrdiff_t>(first * hidden), hidden,
                residual_.begin());
  normalize_into(model_.norm, count, ffn_input_);
  const bool coarse = has_shortlist();
  const size_t vocab = config_.vocab_size;
  const auto product = [&](const Matrix& w, const float* bias, float* y) {
    const Product p{w, bias, y, kTaps, vocab};
    multiply(ffn_input_, count, &p, &p + 1);
  };
  if (coarse) {
    product(model_.lm_head_coarse, model_.lm_head_coarse_bias, logits);
    complete_head(count, logits);
  } else {
    for_head(count, [&](const Matrix& w, size_t row) {
      product(w, model_.lm_head_bias ? model_.lm_head_bias + row : nullptr, logits + row);
    });
  }
  clock.mark(timing_.head);
  timing_.head -= timing_.disk - disk;
}

// Calls use(w, row) with the head for n tokens or, where it stays on the disk or n are many, with parts
// of it that begin at `row`.
template <class Use>
void Engine::for_head(size_t n, const Use& use) {
  Matrix part = model_.lm_head;
  const size_t most = head_rows_ ? head_rows_->range_rows() : as_decode(n) ? part.rows : kHeadRows;
  for (size_t row = 0; row < model_.lm_head.rows; row += part.rows) {
    part.rows = std::min(most, model_.lm_head.rows - row);
    if (head_rows_) {
      Clock clock;
      part.data = head_rows_->range(row, part.rows);
      clock.mark(timing_.disk);
    } else {
      part.data = model_.lm_head.data + row * part.row_bytes;
    }
    use(part, row);
    pause_();
  }
}

// The coarse logit from which on logits become exact. Equal ones may exceed the limit.
float Engine::lowest_exact(const float* logits, std::vector<float>& near) const {
  const float* end = logits + config_.vocab_size;
  const float lowest = largest(logits, config_.vocab_size) - margin_;
  const auto is_near = [&](float logit) { return logit >= lowest; };
  if (static_cast<size_t>(std::count_if(logits, end, is_near)) <= most_exact_) return lowest;
  near.clear();
  std::copy_if(logits, end, std::back_inserter(near), is_near);
  const auto last = near.begin() + static_cast<ptrdiff_t>(most_exact_ - 1);
  std::nth_element(near.begin(), last, near.end(), std::greater<>());
  return *last;
}

// Logits on the shortlist become exact.
void Engine::complete_head(size_t n, float* logits) {
  const size_t vocab = config_.vocab_size;
  std::vector<float> lowest(n);
  for_tokens(n, [&](size_t t, int worker) {
    lowest[t] = lowest_exact(logits + t * vocab, workers_[static_cast<size_t>(worker)].exact);
  });
  if (as_decode(n)) {
    for (size_t t = 0; t < n; ++t) complete_head_token(t, lowest[t], logits + t * vocab);
    return;
  }
  for_head(n, [&](const Matrix& w, size_t begin) {
    pool_.run([&](int worker) {
      Worker& scratch = workers_[static_cast<size_t>(worker)];
      scratch.exact.resize(n * kPanel);
      const Share share = share_of(pieces(w.rows, kPanel), worker, pool_.size());
      for (size_t panel = share.begin; panel < share.end; ++panel) {
        const size_t row = panel * kPanel, rows = std::min(kPanel, w.rows - row);
        multiply_panel(ffn_input_, n, w, row, rows, scratch.exact.data(), kPanel, worker);
        for (size_t t = 0; t < n; ++t)
          for (size_t r = 0; r < rows; ++r) {
            float& logit = logits[t * vocab + begin + row + r];
            const float bias = model_.lm_head_bias ? model_.lm_head_bias[begin + row + r] : 0.0f;
            if (logit >= lowest[t]) logit = scratch.exact[t * kPanel + r] + bias;
          }
      }
    });
  });
}

void Engine::complete_head_token(size_t t, float lowest, float* logits) {
  const Matrix& w = model_.lm_head;
  pool_.run([&](int worker) {
    std::vector<int32_t>& rows = workers_[static_cast<size_t>(worker)].candidates;
    rows.clear();
    const Share share = share_of(config_.vocab_size, worker, pool_.size());
    for (size_t i = share.begin; i < share.end; ++i)
      if (logits[i] >= lowest) rows.push_back(static_cast<int32_t>(i));
  });
  std::vector<int32_t>& all = workers_[0].candidates;
  for (size_t i = 1; i < workers_.size(); ++i)
    all.insert(all.end(), workers_[i].candidates.begin(), workers_[i].candidates.end());
  bytes_read_ += all.size() * w.row_bytes;
  // Exact logits of `rows`, which lie at data + places[i] * row_bytes.
  const auto complete = [&](const int32_t* rows, size_t n, const uint8_t* data,
                            const int32_t* places) {
    pool_.run([&](int worker) {
      std::vector<float>& exact = workers_[static_cast<size_t>(worker)].exact;
      const Share share = share_of(n, worker, pool_.size());
      exact.resize(share.end - share.begin);
      kernels_.gemv_rows[w.type](data, w.row_bytes, places + share.begin, 0, exact.size(), w.cols,
                                 ffn_input_.activation(t), exact.data());
      for (size_t i = share.begin; i < share.end; ++i) {
        const auto row = static_cast<size_t>(rows[i]);
        const float bias = model_.lm_head_bias ? model_.lm_head_bias[row] : 0.0f;
        logits[row] = exact[i - share.begin] + bias;
      }
    });
  };
  if (!head_rows_) return complete(all.data(), all.size(), w.data, all.data());
  slots_.resize(std::max(slots_.size(), all.size()));
  for (size_t begin = 0, n; begin < all.size(); begin += n) {
    n = std::min(head_rows_->room(), all.size() - begin);
    Clock clock;
    head_rows_->fetch(all.data() + begin, n, slots_.data());
    clock.mark(timing_.disk);
    complete(all.data() + begin, n, head_rows_->data(), slots_.data());
  }
}

void Engine::normalize(const Norm& norm, const float* x, size_t width, float* y) const {
  const float n = static_cast<float>(width);
  float mean = 0;
  if (config_.layer_norm) {
    for (size_t i = 0; i < width; ++i) mean += x[i];
    mean /= n;
    for (size_t i = 0; i < width; ++i) y[i] = x[i] - mean;
    x = y;
  }
  const float scale = 1 / std::sqrt(kernels_.sum_squares(x, width) / n + config_.norm_eps);
  for (size_t i = 0; i < width; ++i) y[i] = x[i] * scale * norm.weight[i];
  if (norm.bias) add_to(y, norm.bias, width);
}

// input = norm(residual)
void Engine::normalize_into(const Norm& norm, size_t n, Input& input) {
  const size_t hidden = config_.hidden_size;
  for_tokens(n, [&](size_t t, int) {
    normalize(norm, residual_.data() + t * hidden, hidden, input.x.data() + t * hidden);
  });
  prepare(input, n);
}

// What the products of this input need besides its float values.
void Engine::prepare(Input& input, size_t n) {
  if (!as_decode(n)) {
    if (!kernels_.to_bf16) return;
    for_tokens(n, [&](size_t t, int) {
      kernels_.to_bf16(input.x.data() + t * input.width, input.width,
                       input.half.data() + t * input.width);
    });
  } else if (input.width % 32 == 0) {  // otherwise its weights are F32, F16 or BF16
    for_tokens(n, [&](size_t t, int) {
      const size_t w = input.width;
      kernels_.quantize(input.x.data() + t * w, w, input.high.data() + t * w,
                        input.low.data() + t * w, input.d.data() + t * (w / 32),
                        input.sum.data() + t * (w / 32), input.sum16.data() + t * (w / 16));
    });
  }
}

// All products of one input at once, or, where a plan cuts their inputs, one after another.
void Engine::project(size_t l, Input& input, size_t n, std::initializer_list<Product> products) {
  if (std::none_of(products.begin(), products.end(),
                   [&](const Product& p) { return has_cut(l, {p.input}); })) {
    multiply(input, n, products.begin(), products.end());
  } else {
    cut_input_.width = input.width;
    for (const Product& p : products) {
      for_tokens(n, [&](size_t t, int worker) {
        float* x = cut_input_.x.data() + t * input.width;
        std::copy_n(input.x.data() + t * input.width, input.width, x);
        apply(cut(l, p.input), x, input.width, worker);
      });
      prepare(cut_input_, n);
      multiply(cut_input_, n, &p, &p + 1);
    }
  }
}

void Engine::multiply(const Input& input, size_t n, const Product* begin, const Product* end) {
  const Activation x = input.activation();
  pool_.run([&](int worker) {
    for (const Product* p = begin; p != end; ++p) {
      const auto [first, last] = share_of(p->w.rows, worker, pool_.size());
      float* y = p->y + first;
      if (n == 1) {
        gemv(p->w, nullptr, first, last - first, x, y, worker);
      } else if (as_decode(n)) {
        gemv_tokens(p->w, first, last - first, input, n, y, p->step(), worker);
      } else {
        multiply_block(input, n, *p, worker);
        continue;
      }
      if (p->bias)
        for (size_t t = 0; t < n; ++t) add_to(y + t * p->step(), p->bias + first, last - first);
    }
  });
  if (as_decode(n))
    for (const Product* p = begin; p != end; ++p) bytes_read_ += p->w.bytes();
}

// Whether prefill multiplies this matrix in bfloat16; `k` is the width of its panels.
bool Engine::uses_bf16(const Matrix& w, size_t k) const {
  return kernels_.gemm_bf16 && w.type != kF32 && w.type != kF16 && k % 2 == 0;
}

// One thread's panels of y (T, rows) = x W^T + bias.
void Engine::multiply_block(const Input& input, size_t n, const Product& p, int worker) {
  const Share share = share_of(pieces(p.w.rows, kPanel), worker, pool_.size());
  for (size_t panel = share.begin; panel < share.end; ++panel) {
    const size_t row = panel * kPanel, rows = std::min(kPanel, p.w.rows - row);
    float* y = p.y + row;
    multiply_panel(input, n, p.w, row, rows, y, p.step(), worker);
    if (p.bias)
      for (size_t t = 0; t < n; ++t) add_to(y + t * p.step(), p.bias + row, rows);
  }
}

// y[t * stride + r] = W[row + r] . x_t for some rows, at most kPanel, of W and all tokens.
void Engine::multiply_panel(const Input& input, size_t n, const Matrix& w, size_t row, size_t rows,
                            float* y, size_t stride, int worker) {
  Worker& scratch = workers_[static_cast<size_t>(worker)];
  const size_t k = w.cols;
  for (size_t r = 0; r < rows; ++r)
    kernels_.decode(w.type, row_part(w, row + r, 0, k, scratch.joined.data()), k,
                    scratch.rows.data() + r * k);
  if (uses_bf16(w, k)) {
    kernels_.panel_bf16(scratch.rows.data(), rows, k, scratch.panel_half.data());
    kernels_.gemm_bf16(scratch.panel_half.data(), rows, k, input.half.data(), input.width, n, false,
                       y, stride);
  } else {
    kernels_.panel_f32(scratch.rows.data(), rows, k, scratch.panel.data());
    kernels_.gemm_f32(scratch.panel.data(), rows, k, input.x.data(), input.width, n, false, y,
                      stride);
  }
}

void Engine::activate(float* x, size_t n) const {
  switch (config_.act) {
    case Act::kSilu: return kernels_.silu(x, n);
    case Act::kGeluTanh: return kernels_.gelu_tanh(x, n);
    case Act::kGelu:
      for (size_t i = 0; i < n; ++i) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
      return;
    case Act::kRelu:
      for (size_t i = 0; i < n; ++i) x[i] = std::max(x[i], 0.0f);
      return;
  }
}

const Cut& Engine::cut(size_t layer, Tap tap) const {
  static const Cut kNone;
  return is_dense() || tap == kTaps ? kNone : cuts_[layer][tap];
}

bool Engine::has_cut(size_t layer, std::initializer_list<Tap> taps) const {
  return std::any_of(taps.begin(), taps.end(),
                     [&](Tap tap) { return cut(layer, tap).by != Cut::By::kNothing; });
}

void Engine::apply(const Cut& cut, float* x, size_t width, int worker) {
  if (cut.by == Cut::By::kNothing) return;
  Worker& w = workers_[static_cast<size_t>(worker)];
  float* score = w.magnitudes.data();
  if (cut.weight.empty()) {
    for (size_t i = 0; i < width; ++i) score[i] = std::fabs(x[i]);
  } else {
    for (size_t i = 0; i < width; ++i) score[i] = std::fabs(x[i]) * cut.weight[i];
  }
  float threshold = static_cast<float>(cut.value);
  if (cut.by == Cut::By::kTopk)
    threshold = kernels_.topk_threshold(
        score, width, static_cast<size_t>(std::nearbyint(cut.value * static_cast<double>(width))));
  if (cut.by == Cut::By::kTail) threshold = w.selector.tail(score, width, cut.value);
  for (size_t i = 0; i < width; ++i) x[i] = score[i] <= threshold ? 0.0f : x[i];
}

void Engine::collect_rows(const float* values) {
  n_rows_ = list_rows(values, {0, config_.intermediate_size}, rows_.data());
}

}  // namespace fallow
