#include "engine/experts.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/activation.h"

namespace fallow {
namespace {

// Tokens of a whole block that choose an expert on average, up to which prefill takes kFew of them at a
// time as decode does: unpacking weights for so few would cost more than it saves. Which of the two it is
// must not depend on how many there really are, or logits would depend on the block's size.
constexpr size_t kSmallGroup = 32, kWholeBlock = 256;

}  // namespace

Experts::Experts(Runtime& run, Cuts& cuts, Products& products, const Packed& model, size_t tokens)
    : run_(run), cuts_(cuts), products_(products), model_(model), config_(model.config),
      hidden_(config_.hidden_size), n_experts_(config_.n_experts), n_used_(config_.n_experts_used),
      per_token_(n_used_ + (config_.shared_intermediate_size > 0 ? 1 : 0)),
      few_places_(kFew * per_token_),
      are_groups_small_(kWholeBlock * n_used_ <= kSmallGroup * n_experts_), logits_(tokens * n_experts_),
      experts_(tokens * n_used_), shares_(tokens * per_token_), place_of_(shares_.size()), token_in_(shares_.size()),
      share_in_(shares_.size()), ends_(n_experts_ + 1),
      group_(n_experts_ > 0 ? tokens : 0, hidden_, run.kernels),
      part_(n_experts_ > 0 ? kFew : 0, hidden_, run.kernels) {
  if (n_experts_ == 0) return;
  gate_.resize(std::max(tokens, few_places_) * config_.widest_ffn());
  up_.resize(gate_.size());
  partial_.resize(run.n_threads() * few_places_ * hidden_);
  ahead_logits_.resize(kFew * n_experts_);
  ahead_experts_.resize(kFew * n_used_);
  ahead_shares_.resize(kFew * n_used_);
  y_.resize(tokens * hidden_);
  active_.resize(few_places_ * config_.intermediate_size);
  n_active_.resize(few_places_);
  scratch_.resize(run.n_threads());
  for (Scratch& own : scratch_) own.coefficients.resize(config_.intermediate_size);
}

void Experts::forward(size_t l, const Input& x, size_t n, float* out) {
  route(l, x, n);
  share_out(n);
  for (const Group& group : groups_) {
    if (!cuts(l, group))
      run_.statistics.active[l] += group.size() * model_.layers[l].experts[group.expert].up_proj.rows;
    if (group.expert < n_experts_) run_.statistics.expert_uses[l * n_experts_ + group.expert] += group.size();
  }
  if (run_.active_neurons.rows() > 0) record(l, n);
  is_decode(n) ? few(l, x, n, out) : block(l, x, n, out);
  add_counts(l);
}

// Tells the neurons of every token's experts, or those of the last token of a block.
void Experts::record(size_t l, size_t n) {
  const size_t first = n - run_.active_neurons.rows();
  for (const Group& group : groups_) {
    const size_t begin = group.expert * config_.intermediate_size;
    const size_t end = begin + model_.layers[l].experts[group.expert].up_proj.rows;
    for (size_t i = group.begin; i < group.end; ++i)
      if (token_in_[i] >= first) run_.active_neurons.add_range(token_in_[i] - first, l, begin, end);
  }
}

// Every token's experts and their shares.
void Experts::route(size_t l, const Input& x, size_t n) {
  const Layer& layer = model_.layers[l];
  Clock clock;
  products_.multiply(x, n, {layer.router, layer.router_bias, logits_.data(), kTaps});
  run_.for_tokens(n, [&](size_t t, int worker) {
    choose(l, logits_.data() + t * n_experts_, experts_.data() + t * n_used_,
           shares_.data() + t * per_token_, worker);
  });
  if (per_token_ > n_used_) {
    float* gate = y_.data();
    products_.multiply(x, n, {layer.shared_expert_gate, nullptr, gate, kTaps});
    for (size_t t = 0; t < n; ++t) shares_[t * per_token_ + n_used_] = 1 / (1 + std::exp(-gate[t]));
  }
  clock.mark(run_.statistics.timing.select);
}

// p (n_experts,) = softmax(p); a token's experts are the likeliest, in order, and their shares what the
// router gives them, less what a plan leaves out.
void Experts::choose(size_t l, float* p, size_t* experts, float* shares, int worker) {
  const float largest = *std::max_element(p, p + n_experts_);
  float sum = 0;
  for (size_t e = 0; e < n_experts_; ++e) sum += p[e] = std::exp(p[e] - largest);
  for (size_t e = 0; e < n_experts_; ++e) p[e] /= sum;
  // The k likeliest by insertion; of equals the first.
  size_t n = 0;
  for (size_t e = 0; e < n_experts_; ++e) {
    if (n == n_used_ && !(p[e] > p[experts[n - 1]])) continue;
    size_t i = n < n_used_ ? n++ : n - 1;
    for (; i > 0 && p[e] > p[experts[i - 1]]; --i) experts[i] = experts[i - 1];
    experts[i] = e;
  }
  for (size_t r = 0; r < n; ++r) shares[r] = p[experts[r]];
  if (const Cut& cut = cuts_.at(l, kRouter); cut.cuts()) {
    const float all = std::accumulate(shares, shares + n, 0.0f);
    std::fill(p, p + n_experts_, 0.0f);
    for (size_t r = 0; r < n; ++r) p[experts[r]] = std::sqrt(shares[r] / all);
    cuts_.apply(cut, p, n_experts_, worker);
    for (size_t r = 0; r < n; ++r)
      if (p[experts[r]] == 0) shares[r] = 0;
  }
  const float kept = std::accumulate(shares, shares + n, 0.0f);
  if (config_.norm_experts && kept > 0)
    for (size_t r = 0; r < n; ++r) shares[r] /= kept;
}

// Places of tokens and experts, without those of no share.
void Experts::share_out(size_t n) {
  const auto expert_of = [&](size_t t, size_t r) {
    return r < n_used_ ? experts_[t * n_used_ + r] : n_experts_;
  };
  const auto for_chosen = [&](const auto& use) {
    for (size_t t = 0; t < n; ++t)
      for (size_t r = 0; r < per_token_; ++r)
        if (shares_[t * per_token_ + r] != 0) use(t, r, expert_of(t, r));
  };
  std::fill(ends_.begin(), ends_.end(), 0);
  for_chosen([&](size_t, size_t, size_t e) { ++ends_[e]; });
  groups_.clear();
  size_t begin = 0;
  for (size_t e = 0; e < ends_.size(); ++e) {
    const size_t end = begin + ends_[e];
    if (end > begin) groups_.push_back({e, begin, end});
    ends_[e] = begin;
    begin = end;
  }
  for_chosen([&](size_t t, size_t r, size_t e) {
    const size_t place = ends_[e]++;
    place_of_[t * per_token_ + r] = place;
    token_in_[place] = t;
    share_in_[place] = shares_[t * per_token_ + r];
  });
}

// Calls use(first, last) for as many groups at a time as there is room for in the cache, whose experts are
// then on their way. What is in memory anyway goes along with the last.
template <class Use>
void Experts::for_parts(size_t l, const Use& use) {
  const size_t n = groups_.size();
  if (!cache_) return use(size_t{0}, n);
  for (size_t first = 0, last; first < n; first = last) {
    wanted_.clear();
    uses_.clear();
    for (last = first; last < n && (wanted_.size() < cache_->room() || groups_[last].expert == n_experts_); ++last) {
      if (groups_[last].expert == n_experts_) continue;
      wanted_.push_back(l * n_experts_ + groups_[last].expert);
      uses_.push_back(groups_[last].size());
    }
    cache_->want(wanted_.data(), uses_.data(), wanted_.size());
    use(first, last);
    cache_->check();
  }
}

void Experts::order(size_t first, size_t last) {
  order_.resize(last - first);
  std::iota(order_.begin(), order_.end(), first);
  if (!cache_) return;
  std::stable_partition(order_.begin(), order_.end(), [&](size_t g) {
    return groups_[g].expert == n_experts_ || cache_->was_there(g - first);
  });
}

// Reads ahead what a layer's router chooses of the input of the layer before, which is near its own: the
// residual stream changes little from layer to layer (Eliseev and Mazur, arXiv:2312.17238, 3.2).
void Experts::foresee(size_t l, const Input& x, size_t n) {
  if (!cache_ || l == config_.n_layers) return;
  Clock clock;
  const Layer& layer = model_.layers[l];
  products_.multiply(x, n, {layer.router, layer.router_bias, ahead_logits_.data(), kTaps});
  run_.for_tokens(n, [&](size_t t, int worker) {
    choose(l, ahead_logits_.data() + t * n_experts_, ahead_experts_.data() + t * n_used_,
           ahead_shares_.data() + t * n_used_, worker);
  });
  ahead_.clear();
  for (size_t i = 0; i < n * n_used_; ++i)
    if (ahead_shares_[i] != 0) ahead_.push_back(l * n_experts_ + ahead_experts_[i]);
  cache_->foresee(ahead_.data(), ahead_.size());
  clock.mark(run_.statistics.timing.select);
}

// An expert's weights, the i-th of those that were wanted, when they are there; null if they cannot be read.
const Expert* Experts::weights(size_t l, Group group, size_t i, int worker, Expert& streamed) {
  const Expert& own = model_.layers[l].experts[group.expert];
  if (!cache_ || group.expert == n_experts_) return &own;
  Clock clock;
  const uint8_t* data = cache_->wait(i);
  if (worker == 0) clock.mark(run_.statistics.timing.disk);
  if (!data) return nullptr;
  streamed = own;
  for (Matrix* w : {&streamed.gate_proj, &streamed.up_proj, &streamed.down_proj_t}) {
    w->data = data;
    data += Extent{0, w->bytes()}.room();
  }
  return &streamed;
}

// At most kFew tokens. Every thread takes a range of each expert's neurons all the way, and waits for no
// other. A token's sum does not depend on the tokens beside it.
void Experts::few(size_t l, const Input& x, size_t n, float* out) {
  for_parts(l, [&](size_t first, size_t last) {
    order(first, last);
    if (last == groups_.size()) foresee(l + 1, x, n);
    if (cuts_.leaves_out_neurons(l)) return sparse(l, x, first);
    run_.pool.run([&](int worker) {
      Expert streamed;
      for (const size_t g : order_) {
        const Group group = groups_[g];
        const Expert* e = weights(l, group, g - first, worker, streamed);
        if (!e) continue;
        Activation tokens[kFew] = {};
        for (size_t i = 0; i < group.size(); ++i) tokens[i] = x.activation(token_in_[group.begin + i]);
        run_few(*e, tokens, group.size(), group.begin, worker);
      }
    });
  });
  run_.pool.run([&](int worker) {
    const Share columns = share_of(hidden_, worker, run_.pool.size());
    for (size_t t = 0; t < n; ++t) {
      float* y = out + t * hidden_;
      std::fill(y + columns.begin, y + columns.end, 0.0f);
      for (size_t r = 0; r < per_token_; ++r) {
        const float share = shares_[t * per_token_ + r];
        if (share == 0) continue;
        for (int w = 0; w < run_.pool.size(); ++w) {
          const float* part = partial(w, place_of_[t * per_token_ + r]);
          for (size_t i = columns.begin; i < columns.end; ++i) y[i] += share * part[i];
        }
      }
    }
  });
}

// This thread's part of an expert's FFN for at most kFew tokens, into its sums from a place on.
void Experts::run_few(const Expert& e, const Activation* tokens, size_t n, size_t place, int worker) {
  const Share neurons = share_of_rows(e.up_proj.rows, worker, run_.pool.size());
  gate_and_up(e, tokens, n, place, worker);
  for (size_t t = 0; t < n; ++t)
    activate_experts(run_.kernels, config_, inter_of(place + t) + neurons.begin,
                     up_values(place + t) + neurons.begin, neurons.end - neurons.begin);
  down(e, n, place, worker);
}

void Experts::gate_and_up(const Expert& e, const Activation* tokens, size_t n, size_t place, int worker) {
  const size_t stride = config_.widest_ffn();
  const Share neurons = share_of_rows(e.up_proj.rows, worker, run_.pool.size());
  const size_t count = neurons.end - neurons.begin;
  float *gate = inter_of(place) + neurons.begin, *up = up_values(place) + neurons.begin;
  products_.gemv(e.gate_proj, neurons.begin, count, tokens, n, gate, stride, worker);
  products_.gemv(e.up_proj, neurons.begin, count, tokens, n, up, stride, worker);
  for (size_t t = 0; t < n; ++t) {
    if (e.gate_bias) add_to(gate + t * stride, e.gate_bias + neurons.begin, count);
    if (e.up_bias) add_to(up + t * stride, e.up_bias + neurons.begin, count);
  }
}

void Experts::down(const Expert& e, size_t n, size_t place, int worker) {
  const Share neurons = share_of_rows(e.up_proj.rows, worker, run_.pool.size());
  float* y = partial(worker, place);
  std::fill(y, y + n * hidden_, 0.0f);
  if (e.down_bias && worker == 0)
    for (size_t t = 0; t < n; ++t) add_to(y + t * hidden_, e.down_bias, hidden_);
  products_.axpy(e.down_proj_t, neurons.begin, neurons.end - neurons.begin, inter_of(place) + neurons.begin,
                 config_.widest_ffn(), n, y, hidden_, worker);
}

// A block of prefill: expert by expert, with the tokens that chose it.
void Experts::block(size_t l, const Input& x, size_t n, float* out) {
  std::fill_n(out, n * hidden_, 0.0f);
  for_parts(l, [&](size_t first, size_t last) {
    Expert streamed;
    for (size_t g = first; g < last; ++g) {
      const Group group = groups_[g];
      const Expert* e = weights(l, group, g - first, 0, streamed);
      if (!e) continue;
      if (are_groups_small_ && group.expert < n_experts_) few_at_once(l, *e, x, group, out);
      else whole_group(l, *e, x, group, out);
    }
  });
}

void Experts::whole_group(size_t l, const Expert& e, const Input& x, Group group, float* out) {
  const size_t d_ff = e.up_proj.rows, n = group.size();
  const size_t* tokens = token_in_.data() + group.begin;
  for (size_t i = 0; i < n; ++i)
    std::copy_n(x.x.data() + tokens[i] * hidden_, hidden_, group_.x.data() + i * hidden_);
  products_.prepare(group_, n, false);
  products_.multiply(l, group_, n,
                     {{e.gate_proj, e.gate_bias, gate_.data(), kGateInput},
                      {e.up_proj, e.up_bias, up_.data(), kUpInput}});
  run_.for_tokens(n, [&](size_t i, int worker) {
    float *gate = gate_.data() + i * d_ff, *up = up_.data() + i * d_ff;
    if (cuts(l, group)) masked(l, group.expert, gate, up, worker);
    else activate_experts(run_.kernels, config_, gate, up, d_ff);
  });
  products_.sum_rows(e.down_proj_t, n, gate_.data(), y_.data());
  run_.for_tokens(n, [&](size_t i, int) {
    float* y = out + tokens[i] * hidden_;
    float* own = y_.data() + i * hidden_;
    const float share = share_in_[group.begin + i];
    if (e.down_bias) add_to(own, e.down_bias, hidden_);
    for (size_t j = 0; j < hidden_; ++j) y[j] += share * own[j];
  });
}

void Experts::few_at_once(size_t l, const Expert& e, const Input& x, Group group, float* out) {
  for (size_t first = group.begin, n; first < group.end; first += n) {
    n = std::min(kFew, group.end - first);
    for (size_t i = 0; i < n; ++i)
      std::copy_n(x.x.data() + token_in_[first + i] * hidden_, hidden_, part_.x.data() + i * hidden_);
    products_.prepare(part_, n);
    Activation tokens[kFew] = {};
    for (size_t i = 0; i < n; ++i) tokens[i] = part_.activation(i);
    if (cuts(l, group)) {
      run_.pool.run([&](int worker) { gate_and_up(e, tokens, n, 0, worker); });
      run_.for_tokens(n, [&](size_t i, int worker) {
        masked(l, group.expert, inter_of(i), up_values(i), worker);
      });
      run_.pool.run([&](int worker) { down(e, n, 0, worker); });
    } else {
      run_.pool.run([&](int worker) { run_few(e, tokens, n, 0, worker); });
    }
    run_.for_tokens(n, [&](size_t i, int) {
      float* y = out + token_in_[first + i] * hidden_;
      for (int w = 0; w < run_.pool.size(); ++w) {
        const float* part = partial(w, i);
        for (size_t j = 0; j < hidden_; ++j) y[j] += share_in_[first + i] * part[j];
      }
    });
  }
}

}  // namespace fallow
