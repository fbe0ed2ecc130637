// What every part of a pass over the model shares: kernels, threads, counters.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/kernels.h"
#include "parallel.h"

namespace fallow {

// Tokens that go through the model together as one by one would, to the bit, in less time: decode.
// More are a block of prefill.
constexpr size_t kFew = 8;
inline bool is_decode(size_t tokens) { return tokens <= kFew; }

// Seconds spent since the last reset, by what they were spent on.
struct Timing {
  double attention_proj = 0, attention = 0, ffn = 0, select = 0, head = 0, other = 0;
  double disk = 0;  // waiting for it
};

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

// Since the last reset: tokens read; per layer, summed over them, neurons with a non-zero inter, and those
// predicted ones that decode read the gate of; bytes of weights and cache that decode read. Threads count
// bytes on cache lines of their own.
class Statistics {
 public:
  Statistics(size_t n_layers, size_t n_experts, int n_threads)
      : active(n_layers), predicted(n_layers), expert_uses(n_layers * n_experts),
        bytes_(static_cast<size_t>(n_threads)) {}

  void read(int worker, uint64_t bytes) { bytes_[static_cast<size_t>(worker)].n += bytes; }
  uint64_t bytes_read() const {
    uint64_t sum = 0;
    for (const Count& count : bytes_) sum += count.n;
    return sum;
  }
  void reset() {
    tokens = 0;
    timing = {};
    active.assign(active.size(), 0);
    predicted.assign(predicted.size(), 0);
    expert_uses.assign(expert_uses.size(), 0);
    bytes_.assign(bytes_.size(), {});
  }

  uint64_t tokens = 0;
  std::vector<uint64_t> active, predicted;
  std::vector<uint64_t> expert_uses;  // tokens that chose each expert, layer after layer
  Timing timing;

 private:
  struct alignas(64) Count {
    uint64_t n = 0;
  };
  std::vector<Count> bytes_;
};

// Which neurons the last pass used, where it was asked to tell: those with a non-zero inter, or all where
// nothing was left out; of a mixture, those of the experts that were chosen. Rows of bits, of every token of
// decode and of the last one of a block of prefill: neuron i is bit i % 8 of byte i / 8.
class ActiveNeurons {
 public:
  // Forgets what was recorded, and records `rows` tokens; 0: nothing, at no cost.
  void begin(size_t rows, size_t n_layers, size_t n_neurons) {
    rows_ = rows;
    n_layers_ = n_layers;
    row_bytes_ = (n_neurons + 7) / 8;
    bits_.assign(rows * n_layers * row_bytes_, 0);
  }
  size_t rows() const { return rows_; }
  const std::vector<uint8_t>& bits() const { return bits_; }  // (rows, layers, row_bytes)

  void add_range(size_t row, size_t layer, size_t begin, size_t end) {
    if (rows_ == 0) return;
    uint8_t* bits = row_of(row, layer);
    for (size_t i = begin; i < end; ++i) bits[i / 8] |= static_cast<uint8_t>(1u << i % 8);
  }
  void add_nonzero(size_t row, size_t layer, const float* inter, size_t n) {
    if (rows_ == 0) return;
    uint8_t* bits = row_of(row, layer);
    for (size_t i = 0; i < n; ++i) bits[i / 8] |= static_cast<uint8_t>((inter[i] != 0) << i % 8);
  }

 private:
  uint8_t* row_of(size_t row, size_t layer) { return bits_.data() + (row * n_layers_ + layer) * row_bytes_; }

  size_t rows_ = 0, n_layers_ = 0, row_bytes_ = 0;
  std::vector<uint8_t> bits_;
};

struct Runtime {
  const Kernels& kernels;
  ThreadPool pool;
  Statistics statistics;
  ActiveNeurons active_neurons;
  std::function<void()> pause = [] {};  // called between steps of a long pass; may throw, which ends it

  Runtime(const Kernels& table, int n_threads, size_t n_layers, size_t n_experts, Team team = nullptr)
      : kernels(table), pool(n_threads, team), statistics(n_layers, n_experts, n_threads) {}

  size_t n_threads() const { return static_cast<size_t>(pool.size()); }

  // Calls body(token, worker) for n tokens, spread over the threads.
  template <class Body>
  void for_tokens(size_t n, const Body& body) {
    if (n == 1) return body(0, 0);
    pool.run([&](int worker) {
      const Share share = share_of(n, worker, pool.size());
      for (size_t t = share.begin; t < share.end; ++t) body(t, worker);
    });
  }
};

inline size_t pieces(size_t n, size_t size) { return (n + size - 1) / size; }

inline void add_to(float* y, const float* x, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] += x[i];
}

}  // namespace fallow
