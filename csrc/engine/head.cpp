#include "engine/head.h"

#include <algorithm>
#include <functional>
#include <iterator>

namespace fallow {
namespace {

// Rows of the head between which a block of tokens may be stopped: 0.1 s of Llama-3-8B's, 2.1 s in all.
constexpr size_t kHeadRows = 1 << 14;

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

}  // namespace

void Head::set_shortlist(float nats, size_t most) {
  margin_ = model_.lm_head_coarse.data ? nats : 0;
  most_exact_ = most > 0 ? most : model_.config.vocab_size;
}

void Head::logits(const Input& hidden, size_t n, bool exact, float* logits) {
  const size_t vocab = model_.config.vocab_size;
  if (margin_ > 0 && !exact) {
    products_.multiply(hidden, n, {model_.lm_head_coarse, model_.lm_head_coarse_bias, logits, kTaps, vocab});
    complete(hidden, n, logits);
  } else {
    for_parts(n, [&](const Matrix& w, size_t row) {
      const float* bias = model_.lm_head_bias ? model_.lm_head_bias + row : nullptr;
      products_.multiply(hidden, n, {w, bias, logits + row, kTaps, vocab});
    });
  }
}

// Calls use(w, row) with the head for n tokens or, where it stays on the disk or n are many, with parts
// of it that begin at `row`.
template <class Use>
void Head::for_parts(size_t n, const Use& use) {
  Matrix part = model_.lm_head;
  const size_t most = rows_ ? rows_->range_rows() : is_decode(n) ? part.rows : kHeadRows;
  for (size_t row = 0; row < model_.lm_head.rows; row += part.rows) {
    part.rows = std::min<size_t>(most, model_.lm_head.rows - row);
    if (rows_) {
      Clock clock;
      part.data = rows_->range(row, part.rows);
      clock.mark(run_.statistics.timing.disk);
    } else {
      part.data = model_.lm_head.data + row * part.row_bytes;
    }
    use(part, row);
    run_.pause();
  }
}

// The coarse logit from which on logits become exact. Equal ones may exceed the limit.
float Head::lowest_exact(const float* logits, std::vector<float>& near) const {
  const float* end = logits + model_.config.vocab_size;
  const float lowest = largest(logits, model_.config.vocab_size) - margin_;
  const auto is_near = [&](float logit) { return logit >= lowest; };
  if (static_cast<size_t>(std::count_if(logits, end, is_near)) <= most_exact_) return lowest;
  near.clear();
  std::copy_if(logits, end, std::back_inserter(near), is_near);
  const auto last = near.begin() + static_cast<ptrdiff_t>(most_exact_ - 1);
  std::nth_element(near.begin(), last, near.end(), std::greater<>());
  return *last;
}

// Logits on the shortlist become exact.
void Head::complete(const Input& hidden, size_t n, float* logits) {
  const size_t vocab = model_.config.vocab_size;
  std::vector<float> lowest(n);
  run_.for_tokens(n, [&](size_t t, int worker) {
    lowest[t] = lowest_exact(logits + t * vocab, scratch_[static_cast<size_t>(worker)].exact);
  });
  if (is_decode(n)) {
    for (size_t t = 0; t < n; ++t)
      complete_token(hidden.activation(t), lowest[t], logits + t * vocab);
    return;
  }
  for_parts(n, [&](const Matrix& w, size_t begin) {
    run_.pool.run([&](int worker) {
      std::vector<float>& exact = scratch_[static_cast<size_t>(worker)].exact;
      exact.resize(n * kPanel);
      const Share share = share_of(pieces(w.rows, kPanel), worker, run_.pool.size());
      for (size_t panel = share.begin; panel < share.end; ++panel) {
        const size_t row = panel * kPanel, rows = std::min<size_t>(kPanel, w.rows - row);
        products_.multiply_panel(hidden, n, w, row, rows, exact.data(), kPanel, worker);
        for (size_t t = 0; t < n; ++t)
          for (size_t r = 0; r < rows; ++r) {
            float& logit = logits[t * vocab + begin + row + r];
            if (logit >= lowest[t]) logit = exact[t * kPanel + r] + bias(begin + row + r);
          }
      }
    });
  });
}

void Head::complete_token(const Activation& hidden, float lowest, float* logits) {
  const Matrix& w = model_.lm_head;
  run_.pool.run([&](int worker) {
    std::vector<int32_t>& found = scratch_[static_cast<size_t>(worker)].candidates;
    found.clear();
    const Share share = share_of(w.rows, worker, run_.pool.size());
    for (size_t i = share.begin; i < share.end; ++i)
      if (logits[i] >= lowest) found.push_back(static_cast<int32_t>(i));
  });
  std::vector<int32_t>& all = scratch_[0].candidates;
  for (size_t i = 1; i < scratch_.size(); ++i)
    all.insert(all.end(), scratch_[i].candidates.begin(), scratch_[i].candidates.end());
  // Exact logits of `rows`, which lie at data + places[i] * row_bytes.
  const auto complete = [&](const int32_t* rows, size_t n, const uint8_t* data,
                            const int32_t* places) {
    Matrix there = w;
    there.data = data;
    run_.pool.run([&](int worker) {
      std::vector<float>& exact = scratch_[static_cast<size_t>(worker)].exact;
      const Share share = share_of(n, worker, run_.pool.size());
      exact.resize(share.end - share.begin);
      products_.gemv(there, places + share.begin, 0, exact.size(), hidden, exact.data(), worker);
      for (size_t i = share.begin; i < share.end; ++i) {
        const auto row = static_cast<size_t>(rows[i]);
        logits[row] = exact[i - share.begin] + bias(row);
      }
    });
  };
  if (!rows_) return complete(all.data(), all.size(), w.data, all.data());
  slots_.resize(std::max(slots_.size(), all.size()));
  for (size_t begin = 0, n; begin < all.size(); begin += n) {
    n = std::min(rows_->room(), all.size() - begin);
    Clock clock;
    rows_->fetch(all.data() + begin, n, slots_.data());
    clock.mark(run_.statistics.timing.disk);
    complete(all.data() + begin, n, rows_->data(), slots_.data());
  }
}

}  // namespace fallow
