#include "engine/ffn.h"

#include <algorithm>
#include <utility>

#include "engine/activation.h"
#include "engine/norm.h"

namespace fallow {

Ffn::Ffn(Runtime& run, Cuts& cuts, Products& products, const Packed& model, size_t tokens)
    : run_(run), cuts_(cuts), products_(products), model_(model), config_(model.config),
      hidden_(config_.hidden_size), d_ff_(config_.intermediate_size), inter_(tokens * d_ff_),
      up_(config_.gated ? tokens * d_ff_ : 0), partial_(run.n_threads() * kFew * hidden_),
      active_(d_ff_), token_(1, hidden_, run.kernels), cut_input_(1, hidden_, run.kernels),
      scratch_(run.n_threads()) {
  size_t outliers = 0;
  for (const Layer& layer : model.layers) outliers = std::max<size_t>(outliers, layer.outliers.rows);
  for (Scratch& own : scratch_) {
    own.coefficients.resize(d_ff_);
    own.outliers.resize(outliers);
  }
}

void Ffn::forward(size_t l, const Input& x, size_t n, float* out) {
  const Layer& layer = model_.layers[l];
  d_ff_ = layer.intermediate_size;
  if (!is_decode(n)) {
    block(l, x, n, out);
  } else if (!cuts_.leaves_out_neurons(l)) {
    dense(l, x, n, out);
    for (size_t t = 0; t < n; ++t) run_.active_neurons.add_range(t, l, 0, d_ff_);
  } else if (n == 1) {
    sparse(l, x, out);
    run_.active_neurons.add_nonzero(0, l, inter_.data(), d_ff_);
  } else {
    for (size_t t = 0; t < n; ++t) {
      std::copy_n(x.x.data() + t * hidden_, hidden_, token_.x.data());
      products_.prepare(token_, 1);
      sparse(l, token_, out + t * hidden_);
      run_.active_neurons.add_nonzero(t, l, inter_.data(), d_ff_);
    }
  }
  run_.for_tokens(n, [&](size_t t, int worker) {
    if (layer.down_bias) add_to(out + t * hidden_, layer.down_bias, hidden_);
    cuts_.apply(cuts_.at(l, kFfnOut), out + t * hidden_, hidden_, worker);
  });
}

// At most kFew tokens. Every thread takes a range of neurons all the way, and waits for no other.
void Ffn::dense(size_t l, const Input& x, size_t n, float* out) {
  const Layer& layer = model_.layers[l];
  run_.pool.run([&](int worker) {
    const Share neurons = share_of_rows(d_ff_, worker, run_.pool.size());
    gate(layer, x, n, neurons, worker);
    if (config_.gated) up(layer, x, n, neurons, worker);
    if (!layer.ffn_sub_norm.weight) down(layer, n, neurons, worker);
  });
  if (layer.ffn_sub_norm.weight) {  // which needs all neurons
    for (size_t t = 0; t < n; ++t) norm_inter(layer, inter_.data() + t * d_ff_);
    run_.pool.run([&](int worker) {
      down(layer, n, share_of_rows(d_ff_, worker, run_.pool.size()), worker);
    });
  }
  sum_partials(n, out);
  for (size_t t = 0; t < n; ++t) add_outliers(layer, t, out + t * hidden_, 0);
  run_.statistics.active[l] += n * d_ff_;
  run_.statistics.read(0, layer.outliers.bytes());
}

// inter = gate_act = act(x W_gate^T + b), or without a gate inter = act(x W_up^T + b), of a range of
// neurons.
void Ffn::gate(const Layer& layer, const Input& x, size_t n, Share neurons, int worker) {
  const size_t count = neurons.end - neurons.begin;
  const Matrix& w = config_.gated ? layer.gate_proj : layer.up_proj;
  const float* bias = config_.gated ? layer.gate_bias : layer.up_bias;
  float* inter = inter_.data() + neurons.begin;
  products_.gemv(w, neurons.begin, count, x, n, inter, d_ff_, worker);
  for (size_t t = 0; t < n; ++t, inter += d_ff_) {
    if (bias) add_to(inter, bias + neurons.begin, count);
    activate(inter, count);
  }
}

// inter *= x W_up^T + b
void Ffn::up(const Layer& layer, const Input& x, size_t n, Share neurons, int worker) {
  const size_t count = neurons.end - neurons.begin;
  float *up = up_.data() + neurons.begin, *inter = inter_.data() + neurons.begin;
  products_.gemv(layer.up_proj, neurons.begin, count, x, n, up, d_ff_, worker);
  for (size_t t = 0; t < n; ++t, inter += d_ff_, up += d_ff_) {
    if (layer.up_bias) add_to(up, layer.up_bias + neurons.begin, count);
    rectify_up(up, count);
    for (size_t i = 0; i < count; ++i) inter[i] *= up[i];
  }
}

// This thread's part of inter W_down^T.
void Ffn::down(const Layer& layer, size_t n, Share neurons, int worker) {
  float* y = partial(worker);
  std::fill(y, y + n * hidden_, 0.0f);
  products_.axpy(layer.down_proj_t, neurons.begin, neurons.end - neurons.begin,
                 inter_.data() + neurons.begin, d_ff_, n, y, hidden_, worker);
}

// out = the threads' parts, in the order of the threads.
void Ffn::sum_partials(size_t n, float* out) const {
  for (size_t i = 0; i < n * hidden_; ++i) {
    float sum = 0;
    for (size_t w = 0; w < run_.n_threads(); ++w) sum += partial_[w * kFew * hidden_ + i];
    out[i] = sum;
  }
}

// A block of prefill is dense: some token of it needs nearly every neuron. Cuts are masks.
void Ffn::block(size_t l, const Input& x, size_t n, float* out) {
  const Layer& layer = model_.layers[l];
  if (config_.gated) {
    products_.multiply(l, x, n,
                       {{layer.gate_proj, layer.gate_bias, inter_.data(), kGateInput},
                        {layer.up_proj, layer.up_bias, up_.data(), kUpInput}});
  } else {
    products_.multiply(l, x, n, {{layer.up_proj, layer.up_bias, inter_.data(), kUpInput}});
  }
  run_.for_tokens(n, [&](size_t t, int worker) {
    float* inter = inter_.data() + t * d_ff_;
    const auto cut = [&](Tap tap, float* values) {
      cuts_.apply(cuts_.at(l, tap), values, d_ff_, worker);
    };
    cut(kGatePre, inter);
    activate(inter, d_ff_);
    cut(kGateAct, inter);
    if (config_.gated) {
      float* up = up_.data() + t * d_ff_;
      rectify_up(up, d_ff_);
      cut(kUp, up);
      for (size_t i = 0; i < d_ff_; ++i) inter[i] *= up[i];
    }
    norm_inter(layer, inter);
    cut(kInter, inter);
    cut(kDownInput, inter);
    const auto count = static_cast<uint64_t>(
        std::count_if(inter, inter + d_ff_, [](float v) { return v != 0; }));
    scratch_[static_cast<size_t>(worker)].active += cuts_.is_dense() ? d_ff_ : count;
  });
  add_counts(l);
  if (cuts_.is_dense()) run_.active_neurons.add_range(0, l, 0, d_ff_);
  else run_.active_neurons.add_nonzero(0, l, inter_.data() + (n - 1) * d_ff_, d_ff_);
  products_.sum_rows(layer.down_proj_t, n, inter_.data(), out);
  run_.for_tokens(n, [&](size_t t, int worker) { add_outliers(layer, t, out + t * hidden_, worker); });
}

// out += what the outlier neurons put out.
void Ffn::add_outliers(const Layer& layer, size_t token, float* out, int worker) {
  const Matrix& w = layer.outliers;
  if (w.rows == 0) return;
  float* inter = scratch_[static_cast<size_t>(worker)].outliers.data();
  for (size_t i = 0; i < w.rows; ++i) inter[i] = inter_[token * d_ff_ + layer.outlier_neurons[i]];
  run_.kernels.axpy_rows[w.type](w.data, w.row_bytes, nullptr, 0, w.rows, w.cols, inter, out);
}

void Ffn::add_counts(size_t l) {
  for (Scratch& own : scratch_) {
    run_.statistics.active[l] += std::exchange(own.active, 0);
    run_.statistics.predicted[l] += std::exchange(own.predicted, 0);
  }
}

void Ffn::activate(float* x, size_t n) const { fallow::activate(run_.kernels, config_, x, n); }

void Ffn::norm_inter(const Layer& layer, float* inter) const {
  if (layer.ffn_sub_norm.weight)
    normalize(run_.kernels, config_, layer.ffn_sub_norm, inter, d_ff_, inter);
}

void Ffn::rectify_up(float* x, size_t n) const {
  if (!config_.rectifies_up) return;
  for (size_t i = 0; i < n; ++i) x[i] = std::max(x[i], 0.0f);
}

}  // namespace fallow
