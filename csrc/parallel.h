// The only header that knows about threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace fallow {

// Splits [0, n) into one contiguous range per thread and runs body(begin, end, worker) on each.
// Ranges depend on n and n_threads alone, so results are the same in every run.
// The first exception thrown by any worker is rethrown here.
inline void parallel_ranges(size_t n, int n_threads,
                            const std::function<void(size_t, size_t, int)>& body) {
  const int workers = static_cast<int>(
      std::clamp<size_t>(n, 1, static_cast<size_t>(std::max(1, n_threads))));
  if (workers == 1) {
    body(0, n, 0);
    return;
  }
  std::vector<std::exception_ptr> errors(workers);
  std::vector<std::thread> threads;
  threads.reserve(workers);
  for (int w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      try {
        body(n * w / workers, n * (w + 1) / workers, w);
      } catch (...) {
        errors[w] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace fallow
