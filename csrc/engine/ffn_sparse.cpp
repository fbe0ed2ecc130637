// One token under a plan: predict, gate, choose, up, choose, down. Rows of neurons that are inactive by
// then are not read.
#include <algorithm>
#include <numeric>

#include "engine/ffn.h"

namespace fallow {

void Ffn::sparse(size_t l, const Input& x, float* out) {
  const Layer& layer = model_.layers[l];
  chooses_apart(l) && !layer.ffn_sub_norm.weight ? sparse_apart(l, x, out) : sparse_together(l, x, out);
  add_outliers(layer, 0, out, 0);
  run_.statistics.read(0, layer.outliers.bytes());
}

// Whether a neuron's own gate_act and inter are enough to know that it is inactive.
bool Ffn::chooses_apart(size_t l) const {
  return !cuts_.any(l, {kGateInput, kUpInput, kGatePre, kUp, kDownInput}) &&
         cuts_.at(l, kGateAct).is_fixed() && cuts_.at(l, kInter).is_fixed();
}

// By fixed thresholds: every thread takes a range of neurons all the way, and waits for no other.
void Ffn::sparse_apart(size_t l, const Input& x, float* out) {
  const Layer& layer = model_.layers[l];
  run_.pool.run([&](int worker) {
    const Share range = share_of_rows(d_ff_, worker, run_.pool.size());
    Neurons neurons{nullptr, range.begin, range.end - range.begin};
    gate_of(l, x, range, worker);
    neurons = choose(cuts_.at(l, kGateAct), neurons, range);
    up_of(layer, x.activation(), neurons, worker);
    neurons = choose(cuts_.at(l, kInter), neurons, range);
    down_of(layer, neurons, worker);
    scratch_[static_cast<size_t>(worker)].active = neurons.n;
  });
  add_counts(l);
  sum_partials(1, out);
}

// Which neurons of a thread's range stay active.
Neurons Ffn::choose(const Cut& cut, Neurons among, Share range) {
  if (!cut.cuts()) return among;
  int32_t* list = active_.data() + range.begin;
  return {list, range.begin, cuts_.keep_active(cut, inter_.data(), range, list)};
}

// By cuts that need all of a token's values, or with a norm that does: threads meet at each of them.
void Ffn::sparse_together(size_t l, const Input& x, float* out) {
  const Layer& layer = model_.layers[l];
  float* inter = inter_.data();
  const Tap input = config_.gated ? kGateInput : kUpInput;
  Clock clock;
  if (!cuts_.any(l, {input, kGatePre})) {
    run_.pool.run([&](int worker) {
      gate_of(l, x, share_of_rows(d_ff_, worker, run_.pool.size()), worker);
    });
    clock = Clock();
  } else {
    const Matrix& w = config_.gated ? layer.gate_proj : layer.up_proj;
    products_.multiply(l, x, 1, {{w, config_.gated ? layer.gate_bias : layer.up_bias, inter, input}});
    clock = Clock();
    cuts_.apply(cuts_.at(l, kGatePre), inter, d_ff_, 0);
    activate(inter, d_ff_);
  }
  cuts_.apply(cuts_.at(l, kGateAct), inter, d_ff_, 0);
  const bool chosen = cuts_.chooses_by_gate(l);
  list_active_of(chosen);
  clock.mark(run_.statistics.timing.select);

  const Input* up_input = &x;
  if (config_.gated && cuts_.any(l, {kUpInput})) {
    std::copy_n(x.x.begin(), hidden_, cut_input_.x.begin());
    cuts_.apply(cuts_.at(l, kUpInput), cut_input_.x.data(), hidden_, 0);
    products_.prepare(cut_input_, 1);
    up_input = &cut_input_;
  }
  const Activation up_x = up_input->activation();
  const auto listed = [&](int worker) {
    const Share s = share_of(n_active_, worker, run_.pool.size());
    return Neurons{active_.data() + s.begin, s.begin, s.end - s.begin};
  };
  const auto share = [&](int worker) {  // of those whose up is read
    if (chosen) return listed(worker);
    const Share s = share_of_rows(d_ff_, worker, run_.pool.size());
    return Neurons{nullptr, s.begin, s.end - s.begin};
  };
  if (!layer.ffn_sub_norm.weight && !cuts_.any(l, {kUp, kInter, kDownInput})) {
    run_.pool.run([&](int worker) {
      up_of(layer, up_x, share(worker), worker);
      down_of(layer, share(worker), worker);
    });
  } else {
    const bool cuts_up = config_.gated && cuts_.any(l, {kUp});
    if (cuts_up) std::fill_n(up_.begin(), d_ff_, 0.0f);
    run_.pool.run([&](int worker) {
      cuts_up ? whole_up_of(layer, up_x, share(worker), worker)
              : up_of(layer, up_x, share(worker), worker);
    });
    if (cuts_up) {
      cuts_.apply(cuts_.at(l, kUp), up_.data(), d_ff_, 0);
      for (size_t i = 0; i < d_ff_; ++i) inter[i] *= up_[i];
    }
    clock = Clock();
    norm_inter(layer, inter);
    cuts_.apply(cuts_.at(l, kInter), inter, d_ff_, 0);
    cuts_.apply(cuts_.at(l, kDownInput), inter, d_ff_, 0);
    list_active_of(true);
    clock.mark(run_.statistics.timing.select);
    run_.pool.run([&](int worker) { down_of(layer, listed(worker), worker); });
  }
  run_.statistics.active[l] += n_active_;
  add_counts(l);
  sum_partials(1, out);
}

// All neurons, or those that are not zero.
void Ffn::list_active_of(bool some) {
  if (some) {
    n_active_ = run_.kernels.list_nonzero(inter_.data(), 0, d_ff_, active_.data());
  } else {
    std::iota(active_.begin(), active_.end(), 0);
    n_active_ = d_ff_;
  }
}

// inter = gate_act of a thread's neurons: where the layer predicts, of those alone for which the coarse
// gate is above zero, and 0 of the others.
void Ffn::gate_of(size_t l, const Input& x, Share range, int worker) {
  const Layer& layer = model_.layers[l];
  if (!predicts(l)) return gate(layer, x, 1, range, worker);
  const size_t count = range.end - range.begin;
  const float* bias = layer.gate_coarse_bias + range.begin;
  float *values = up_.data() + range.begin, *inter = inter_.data();
  int32_t* list = active_.data() + range.begin;
  products_.gemv(layer.gate_coarse, nullptr, range.begin, count, x.activation(), values, worker);
  size_t n = 0;
  for (size_t i = 0; i < count; ++i) {
    list[n] = static_cast<int32_t>(range.begin + i);
    n += values[i] + bias[i] > 0;
  }
  products_.gemv(layer.gate_proj, list, 0, n, x.activation(), values, worker);
  if (layer.gate_bias)
    for (size_t i = 0; i < n; ++i) values[i] += layer.gate_bias[list[i]];
  activate(values, n);
  std::fill(inter + range.begin, inter + range.end, 0.0f);
  for (size_t i = 0; i < n; ++i) inter[list[i]] = values[i];
  scratch_[static_cast<size_t>(worker)].predicted = n;
}

// inter *= x W_up^T + b for a thread's neurons.
void Ffn::up_of(const Layer& layer, const Activation& x, Neurons neurons, int worker) {
  if (!config_.gated) return;
  const float* bias = layer.up_bias;
  float *up = up_.data() + neurons.begin, *inter = inter_.data();
  read_up(layer, x, neurons, up, worker);
  if (neurons.list) {
    if (bias)
      for (size_t i = 0; i < neurons.n; ++i) up[i] += bias[neurons.list[i]];
    rectify_up(up, neurons.n);
    for (size_t i = 0; i < neurons.n; ++i) inter[neurons.list[i]] *= up[i];
  } else {
    if (bias) add_to(up, bias + neurons.begin, neurons.n);
    rectify_up(up, neurons.n);
    for (size_t i = 0; i < neurons.n; ++i) inter[neurons.begin + i] *= up[i];
  }
}

// up = x W_up^T + b in its neurons' own places.
void Ffn::whole_up_of(const Layer& layer, const Activation& x, Neurons neurons, int worker) {
  float* up = scratch_[static_cast<size_t>(worker)].coefficients.data();
  read_up(layer, x, neurons, up, worker);
  if (layer.up_bias)
    for (size_t i = 0; i < neurons.n; ++i) up[i] += layer.up_bias[neurons.at(i)];
  rectify_up(up, neurons.n);
  for (size_t i = 0; i < neurons.n; ++i) up_[neurons.at(i)] = up[i];
}

// The products of x with a thread's neurons' rows of up_proj, which lies in tiles if none are listed.
void Ffn::read_up(const Layer& layer, const Activation& x, Neurons neurons, float* up, int worker) {
  if (neurons.list) {
    products_.gemv(layer.up_proj, neurons.list, neurons.begin, neurons.n, x, up, worker);
  } else {
    products_.gemv(layer.up_proj, neurons.begin, neurons.n, &x, 1, up, d_ff_, worker);
  }
}

// This thread's part of inter W_down^T.
void Ffn::down_of(const Layer& layer, Neurons neurons, int worker) {
  float *y = partial(worker), *own = scratch_[static_cast<size_t>(worker)].coefficients.data();
  const float* inter = inter_.data() + neurons.begin;
  if (neurons.list) {
    for (size_t i = 0; i < neurons.n; ++i) own[i] = inter_[static_cast<size_t>(neurons.list[i])];
    inter = own;
  }
  std::fill(y, y + hidden_, 0.0f);
  products_.axpy(layer.down_proj_t, neurons.list, neurons.begin, neurons.n, inter, y, worker);
}

}  // namespace fallow
