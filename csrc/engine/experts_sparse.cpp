// Experts under a plan that cuts their neurons. For few tokens those of each place, a token and an expert
// that it uses: gate, choose, up, choose, down. Rows of neurons that are inactive by then are not read.
#include <algorithm>
#include <numeric>
#include <utility>

#include "engine/activation.h"
#include "engine/experts.h"

namespace fallow {

// Whether a neuron's own gate_act and inter are enough to know that it is inactive.
bool Experts::chooses_apart(size_t l) const {
  return !cuts_.any(l, {kGatePre, kUp}) && cuts_.at(l, kGateAct).is_fixed() && cuts_.at(l, kInter).is_fixed();
}

// A token's inter of an expert, in place of what gate_proj puts out: cuts are masks. `up` is overwritten.
void Experts::masked(size_t l, size_t expert, float* gate, float* up, int worker) {
  const size_t d_ff = config_.intermediate_size;
  const auto cut = [&](Tap tap, float* values) {
    cuts_.apply(cuts_.at(l, tap), values, d_ff, worker, expert * d_ff);
  };
  cut(kGatePre, gate);
  activate_gate(run_.kernels, config_, gate, d_ff);
  cut(kGateAct, gate);
  activate_up(config_, up, d_ff);
  cut(kUp, up);
  for (size_t i = 0; i < d_ff; ++i) gate[i] *= up[i];
  cut(kInter, gate);
  scratch_[static_cast<size_t>(worker)].active +=
      static_cast<uint64_t>(std::count_if(gate, gate + d_ff, [](float v) { return v != 0; }));
}

// At most kFew tokens, and the experts of order_, into threads' sums. By fixed thresholds every thread takes
// a range of each expert's neurons all the way; otherwise they meet when all of a place's values are there.
void Experts::sparse(size_t l, const Input& x, size_t first) {
  const int workers = run_.pool.size();
  const bool apart = chooses_apart(l);
  const auto for_places = [&](int worker, const auto& use) {
    Expert streamed;
    for (const size_t g : order_) {
      const Group group = groups_[g];
      if (!cuts(l, group)) continue;
      const Expert* e = weights(l, group, g - first, worker, streamed);
      for (size_t place = group.begin; e && place < group.end; ++place)
        use(*e, group.expert, place, x.activation(token_in_[place]));
    }
  };
  run_.pool.run([&](int worker) {
    for (const size_t g : order_) {
      const Group group = groups_[g];
      if (cuts(l, group)) continue;
      Activation tokens[kFew] = {};
      for (size_t i = 0; i < group.size(); ++i) tokens[i] = x.activation(token_in_[group.begin + i]);
      run_few(model_.layers[l].experts[group.expert], tokens, group.size(), group.begin, worker);
    }
    const Share range = share_of_rows(config_.intermediate_size, worker, workers);
    for_places(worker, [&](const Expert& e, size_t expert, size_t place, const Activation& token) {
      gate_of(e, token, place, range, worker);
      if (!apart) return;
      activate_gate(run_.kernels, config_, inter_of(place) + range.begin, range.end - range.begin);
      Neurons neurons{nullptr, range.begin, range.end - range.begin};
      neurons = choose(l, kGateAct, expert, place, neurons, range);
      up_of(e, token, place, neurons, false, worker);
      neurons = choose(l, kInter, expert, place, neurons, range);
      down_of(e, place, neurons, worker);
      scratch_[static_cast<size_t>(worker)].active += neurons.n;
    });
  });
  if (apart) return;

  Clock clock;
  cut_places_.clear();
  for (const size_t g : order_)
    if (cuts(l, groups_[g]))
      for (size_t place = groups_[g].begin; place < groups_[g].end; ++place)
        cut_places_.emplace_back(place, groups_[g].expert);
  run_.for_tokens(cut_places_.size(), [&](size_t i, int worker) {
    choose_by_gate(l, cut_places_[i].second, cut_places_[i].first, worker);
  });
  clock.mark(run_.statistics.timing.select);

  const auto listed = [&](size_t place, int worker) {
    const Share s = share_of(n_active_[place], worker, workers);
    return Neurons{active_of(place) + s.begin, s.begin, s.end - s.begin};
  };
  const bool chosen = cuts_.chooses_by_gate(l), cuts_up = cuts_.any(l, {kUp});
  const bool chooses_again = cuts_.any(l, {kUp, kInter});
  run_.pool.run([&](int worker) {
    for_places(worker, [&](const Expert& e, size_t, size_t place, const Activation& token) {
      const Share range = share_of_rows(config_.intermediate_size, worker, workers);
      const Neurons neurons = chosen ? listed(place, worker)
                                     : Neurons{nullptr, range.begin, range.end - range.begin};
      up_of(e, token, place, neurons, cuts_up, worker);
      if (!chooses_again) down_of(e, place, neurons, worker);
    });
  });
  if (chooses_again) {
    clock = Clock();
    run_.for_tokens(cut_places_.size(), [&](size_t i, int worker) {
      choose_by_inter(l, cut_places_[i].second, cut_places_[i].first, worker);
    });
    clock.mark(run_.statistics.timing.select);
    run_.pool.run([&](int worker) {
      for_places(worker, [&](const Expert& e, size_t, size_t place, const Activation&) {
        down_of(e, place, listed(place, worker), worker);
      });
    });
  }
  for (const auto& [place, expert] : cut_places_) run_.statistics.active[l] += n_active_[place];
}

// gate_pre of a thread's neurons, in place of inter.
void Experts::gate_of(const Expert& e, const Activation& x, size_t place, Share range, int worker) {
  const size_t count = range.end - range.begin;
  float* inter = inter_of(place) + range.begin;
  products_.gemv(e.gate_proj, range.begin, count, &x, 1, inter, config_.widest_ffn(), worker);
  if (e.gate_bias) add_to(inter, e.gate_bias + range.begin, count);
}

// Which neurons of a thread's range stay active, by a fixed threshold.
Neurons Experts::choose(size_t l, Tap tap, size_t expert, size_t place, Neurons among, Share range) {
  const Cut& cut = cuts_.at(l, tap);
  if (!cut.cuts()) return among;
  int32_t* list = active_of(place) + range.begin;
  return {list, range.begin,
          cuts_.keep_active(cut, inter_of(place), range, list, expert * config_.intermediate_size)};
}

// gate_act of a whole place, what of it is active, and a list of that.
void Experts::choose_by_gate(size_t l, size_t expert, size_t place, int worker) {
  const size_t d_ff = config_.intermediate_size;
  float* inter = inter_of(place);
  cuts_.apply(cuts_.at(l, kGatePre), inter, d_ff, worker, expert * d_ff);
  activate_gate(run_.kernels, config_, inter, d_ff);
  cuts_.apply(cuts_.at(l, kGateAct), inter, d_ff, worker, expert * d_ff);
  int32_t* active = active_of(place);
  if (cuts_.chooses_by_gate(l)) {
    n_active_[place] = run_.kernels.list_nonzero(inter, 0, d_ff, active);
  } else {
    std::iota(active, active + d_ff, 0);
    n_active_[place] = d_ff;
  }
  if (cuts_.any(l, {kUp})) std::fill_n(up_values(place), d_ff, 0.0f);
}

// The same of inter.
void Experts::choose_by_inter(size_t l, size_t expert, size_t place, int worker) {
  const size_t d_ff = config_.intermediate_size;
  float *inter = inter_of(place), *up = up_values(place);
  if (const Cut& cut = cuts_.at(l, kUp); cut.cuts()) {
    cuts_.apply(cut, up, d_ff, worker, expert * d_ff);
    for (size_t i = 0; i < d_ff; ++i) inter[i] *= up[i];
  }
  cuts_.apply(cuts_.at(l, kInter), inter, d_ff, worker, expert * d_ff);
  n_active_[place] = run_.kernels.list_nonzero(inter, 0, d_ff, active_of(place));
}

// inter *= up of a thread's neurons, or the `whole` up in its neurons' own places. up_proj lies in tiles if
// none are listed.
void Experts::up_of(const Expert& e, const Activation& x, size_t place, Neurons neurons, bool whole, int worker) {
  float* up = scratch_[static_cast<size_t>(worker)].coefficients.data();
  float *inter = inter_of(place), *values = up_values(place);
  if (neurons.list) products_.gemv(e.up_proj, neurons.list, neurons.begin, neurons.n, x, up, worker);
  else products_.gemv(e.up_proj, neurons.begin, neurons.n, &x, 1, up, config_.widest_ffn(), worker);
  if (e.up_bias)
    for (size_t i = 0; i < neurons.n; ++i) up[i] += e.up_bias[neurons.at(i)];
  activate_up(config_, up, neurons.n);
  for (size_t i = 0; i < neurons.n; ++i) {
    if (whole) values[neurons.at(i)] = up[i];
    else inter[neurons.at(i)] *= up[i];
  }
}

// This thread's part of what an expert puts out.
void Experts::down_of(const Expert& e, size_t place, Neurons neurons, int worker) {
  float *y = partial(worker, place), *own = scratch_[static_cast<size_t>(worker)].coefficients.data();
  const float* inter = inter_of(place);
  for (size_t i = 0; i < neurons.n; ++i) own[i] = inter[neurons.at(i)];
  std::fill(y, y + hidden_, 0.0f);
  if (e.down_bias && worker == 0) add_to(y, e.down_bias, hidden_);
  products_.axpy(e.down_proj_t, neurons.list, neurons.begin, neurons.n, own, y, worker);
}

void Experts::add_counts(size_t l) {
  for (Scratch& own : scratch_) run_.statistics.active[l] += std::exchange(own.active, 0);
}

}  // namespace fallow
