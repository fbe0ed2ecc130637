#include "engine/engine.h"

#include <algorithm>

#include "engine/norm.h"

namespace fallow {
namespace {

size_t widest_input(const Config& c) {
  return std::max<size_t>({c.hidden_size, size_t{c.n_heads} * c.head_dim, c.hidden_size_per_layer_input});
}

}  // namespace

Engine::Engine(const Packed& model, const Kernels& kernels, int n_threads, uint32_t context,
               size_t block, size_t slots)
    : model_(model), config_(model.config), context_(context),
      block_(std::min<size_t>(block, context)), held_(slots), places_(block_), run_(kernels, n_threads, config_.n_layers, config_.n_experts),
      cuts_(run_, std::max<size_t>({widest_input(config_), config_.intermediate_size, config_.n_experts})),
      products_(run_, cuts_, block_, widest_input(config_), config_.widest_ffn()),
      attention_(run_, products_, model, block_, context, slots), ffn_(run_, cuts_, products_, model, block_),
      experts_(run_, cuts_, products_, model, block_), per_layer_inputs_(run_, products_, model, block_),
      head_(run_, products_, model), normed_(block_, config_.hidden_size, kernels),
      residual_(block_ * config_.hidden_size), branch_(residual_.size()),
      embedding_row_(model.embed_tokens.row_bytes) {}

void Engine::set_stream(Streamer* streamer, std::vector<StreamedLayer> layers) {
  streamer_ = streamer;
  streamed_ = std::move(layers);
}

void Engine::begin_pass(bool dense, bool exact) {
  cuts_.leave_aside(dense);
  products_.allow_bytes(!exact);
}

// Reads n tokens of a slot, and calls use(start, size) after each block of them.
template <class Use>
void Engine::blocks(const int32_t* tokens, size_t n, size_t slot, uint32_t position, bool record,
                    const Use& use) {
  held_[slot] = position;
  for (size_t start = 0, size; start < n; start += size) {
    size = std::min(block_, n - start);
    for (size_t t = 0; t < size; ++t) places_[t] = {slot, position + start + t};
    const size_t recorded = record ? (is_decode(size) ? size : 1) : 0;
    run_.active_neurons.begin(recorded, config_.n_layers, config_.neurons(config_.intermediate_size));
    block(tokens + start, places_.data(), size);
    use(start, size);
  }
  run_.statistics.tokens += n;
}

void Engine::forward(const int32_t* tokens, size_t n, size_t slot, uint32_t position, bool all,
                     bool dense, bool exact, bool record, float* logits) {
  begin_pass(dense, exact);
  blocks(tokens, n, slot, position, record, [&](size_t start, size_t size) {
    if (all) {
      head(size, true, dense, logits + start * config_.vocab_size);
    } else if (start + size == n) {
      head(size, false, dense, logits);
    }
  });
}

void Engine::hidden_states(const int32_t* tokens, size_t n, size_t slot, uint32_t position, float* hidden) {
  begin_pass(false, false);
  const size_t width = config_.hidden_size;
  blocks(tokens, n, slot, position, false, [&](size_t start, size_t size) {
    norm(model_.norm, size, normed_);
    std::copy_n(normed_.x.begin(), size * width, hidden + start * width);
  });
}

void Engine::forward_together(const int32_t* tokens, const Place* places, size_t n, bool dense,
                              bool record, float* logits) {
  begin_pass(dense, false);
  for (size_t t = 0; t < n; ++t) held_[places[t].slot] = static_cast<uint32_t>(places[t].position);
  run_.active_neurons.begin(record ? n : 0, config_.n_layers, config_.neurons(config_.intermediate_size));
  block(tokens, places, n);
  head(n, true, dense, logits);
  run_.statistics.tokens += n;
}

// x = embedding; then, layer by layer, x += attention(norm(x)) and x += ffn(norm(x)).
void Engine::block(const int32_t* tokens, const Place* places, size_t n) {
  Timing& timing = run_.statistics.timing;
  Clock clock;
  const double disk = timing.disk;
  attention_.begin(places);
  embed(tokens, places, n);
  clock.mark(timing.other);
  timing.other -= timing.disk - disk;
  for (size_t l = 0; l < config_.n_layers; ++l) {
    const Layer& layer = model_.layers[l];
    norm(layer.attn_norm, n, normed_);
    clock.mark(timing.other);
    attention_.attend(l, normed_, n, branch_.data());
    clock = Clock();
    const bool parallel = config_.parallel;
    if (parallel && layer.ffn_norm.weight) norm(layer.ffn_norm, n, normed_);
    add_branch(layer.attn_post_norm, n);
    if (!parallel) norm(layer.ffn_norm, n, normed_);
    clock.mark(timing.other);
    ffn(l, n);
    clock = Clock();
    add_branch(layer.ffn_post_norm, n);
    end_layer(l, n);
    clock.mark(timing.other);
    run_.pause();
  }
  for (size_t t = 0; t < n; ++t) held_[places[t].slot] = static_cast<uint32_t>(places[t].position + 1);
}

void Engine::embed(const int32_t* tokens, const Place* places, size_t n) {
  const size_t hidden = config_.hidden_size;
  rows_of(model_.embed_tokens, embedding_rows_, tokens, n, [&](size_t t, const uint8_t* row) {
    float* x = residual_.data() + t * hidden;
    run_.kernels.decode(model_.embed_tokens.type, row, hidden, x);
    for (size_t i = 0; i < hidden; ++i) x[i] *= config_.embedding_scale;
    if (model_.embed_positions) add_to(x, model_.embed_positions + places[t].position * hidden, hidden);
  });
  if (config_.hidden_size_per_layer_input == 0) return;
  norm({}, n, normed_);
  per_layer_inputs_.begin(normed_, n);
  rows_of(model_.embed_tokens_per_layer, per_layer_rows_, tokens, n,
          [&](size_t t, const uint8_t* row) { per_layer_inputs_.add_row(t, row); });
}

// Calls use(t, row) with the bytes of each token's row of a table, which may come from the disk.
template <class Use>
void Engine::rows_of(const Matrix& table, FileRows* rows, const int32_t* tokens, size_t n, const Use& use) {
  const uint8_t* data = rows ? rows->data() : table.data;
  if (rows) row_slots_.resize(std::max(row_slots_.size(), n));
  for (size_t t = 0, fetched = 0; t < n; ++t) {
    int32_t row = tokens[t];
    if (rows) {
      if (t == fetched) {
        Clock clock;
        const size_t more = std::min(rows->room(), n - t);
        rows->fetch(tokens + t, more, row_slots_.data() + t);
        fetched += more;
        clock.mark(run_.statistics.timing.disk);
      }
      row = row_slots_[t];
    }
    const uint8_t* weights = data + static_cast<size_t>(row) * table.row_bytes;
    if (table.layout != Layout::kRows) {
      row_of_tiles(table.type, data, static_cast<size_t>(row), table.row_bytes, embedding_row_.data());
      weights = embedding_row_.data();
    }
    use(t, weights);
  }
}

// branch = ffn(normed), with the layer's matrices from the disk if they are not in memory.
void Engine::ffn(size_t l, size_t n) {
  Timing& timing = run_.statistics.timing;
  Clock clock;
  const bool streams = streamer_ && !streamed_[l].places.empty();
  if (streams) {
    const uint8_t* unit = streamer_->wait(streamed_[l].unit);
    for (const auto& [place, at] : streamed_[l].places) *place = unit + at;
    clock.mark(timing.disk);
  }
  const double apart = timing.select + timing.disk;
  if (config_.n_experts > 0) experts_.forward(l, normed_, n, branch_.data());
  else ffn_.forward(l, normed_, n, branch_.data());
  if (streams) streamer_->done();
  clock.mark(timing.ffn);
  timing.ffn -= timing.select + timing.disk - apart;
}

// input = norm(residual), or the residual where there is no norm.
void Engine::norm(const Norm& norm, size_t n, Input& input) {
  const size_t hidden = config_.hidden_size;
  run_.for_tokens(n, [&](size_t t, int) {
    const float* x = residual_.data() + t * hidden;
    float* y = input.x.data() + t * hidden;
    if (norm.weight) normalize(run_.kernels, config_, norm, x, hidden, y);
    else std::copy_n(x, hidden, y);
  });
  products_.prepare(input, n);
}

// residual += residual_scale * norm(branch)
void Engine::add_branch(const Norm& post_norm, size_t n) {
  const size_t hidden = config_.hidden_size;
  run_.for_tokens(n, [&](size_t t, int) {
    float* y = branch_.data() + t * hidden;
    if (post_norm.weight) normalize(run_.kernels, config_, post_norm, y, hidden, y);
    if (config_.residual_scale != 1)
      for (size_t i = 0; i < hidden; ++i) y[i] *= config_.residual_scale;
    add_to(residual_.data() + t * hidden, y, hidden);
  });
}

// What some models do behind the FFN: add what the layer makes of its own input, and scale everything.
void Engine::end_layer(size_t l, size_t n) {
  const Layer& layer = model_.layers[l];
  if (config_.hidden_size_per_layer_input > 0) {
    norm({}, n, normed_);
    per_layer_inputs_.forward(l, normed_, n, branch_.data());
    add_branch(layer.post_per_layer_input_norm, n);
  }
  if (!layer.layer_scalar) return;
  for (size_t i = 0; i < n * config_.hidden_size; ++i) residual_[i] *= *layer.layer_scalar;
}

void Engine::head(size_t n, bool all, bool dense, float* logits) {
  Timing& timing = run_.statistics.timing;
  Clock clock;
  const double disk = timing.disk;
  const size_t hidden = config_.hidden_size, first = all ? 0 : n - 1;
  if (first > 0)
    std::copy_n(residual_.begin() + static_cast<std::ptrdiff_t>(first * hidden), hidden,
                residual_.begin());
  norm(model_.norm, n - first, normed_);
  head_.logits(normed_, n - first, dense, logits);
  if (config_.logit_softcap > 0)
    run_.for_tokens(n - first, [&](size_t t, int) {
      soft_cap(logits + t * config_.vocab_size, config_.vocab_size, config_.logit_softcap);
    });
  clock.mark(timing.head);
  timing.head -= timing.disk - disk;
}

}  // namespace fallow
