// The only header that knows about threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace fallow {

// The system does not allow so many threads.
struct ThreadError : std::runtime_error {
  ThreadError(int n, const std::system_error& error)
      : std::runtime_error("the system does not start " + std::to_string(n) + " threads (" +
                           error.code().message() + "); give fewer --threads, or raise the limit: "
                           "ulimit -u, the memory, or pids.max of the cgroup") {}
};

// Starts n threads that run body(i) for their i. If one does not start, calls end() for those that did,
// which must make them return, and throws ThreadError: of threads that run there must be no destructor.
template <class Body, class End>
void start_threads(std::vector<std::thread>& threads, int n, const Body& body, const End& end) {
  try {
    threads.reserve(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) threads.emplace_back([body, i] { body(i); });
  } catch (const std::system_error& error) {
    end();
    throw ThreadError(n, error);
  }
}

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
  const auto work = [&](int w) {
    try {
      body(n * w / workers, n * (w + 1) / workers, w);
    } catch (...) {
      errors[w] = std::current_exception();
    }
  };
  for (int w = 0; w < workers; ++w) {
    try {
      threads.emplace_back(work, w);
    } catch (const std::system_error&) {  // the system allows no more: this one does their work
      work(w);
    }
  }
  for (auto& thread : threads) thread.join();
  for (auto& error : errors)
    if (error) std::rethrow_exception(error);
}

// The share of [0, n) that falls to a worker: contiguous, the same in every run.
struct Share {
  size_t begin, end;
};
inline Share share_of(size_t n, int worker, int workers) {
  const auto w = static_cast<size_t>(worker), all = static_cast<size_t>(workers);
  return {n * w / all, n * (w + 1) / all};
}

// Threads of somebody else's: calls call(context, worker) for every worker in [0, n) and waits for all.
using Team = void (*)(int n, void (*call)(const void*, int), const void* context);

// Threads that wait for the next small piece of work by spinning, then asleep. A decoded token is
// some 150 pieces of 10 to 100 microseconds, which starting threads or a lock would double.
class ThreadPool {
 public:
  // With a team there are no threads of its own: two pools that spin on the same processors take each
  // other's time (224 to 3,000 ms per token beside llama.cpp's on two).
  explicit ThreadPool(int n_threads, Team team = nullptr) : n_threads_(n_threads), team_(team) {
    if (team) return;
    start_threads(threads_, n_threads - 1, [this](int i) { work(i + 1); }, [this] { end(); });
  }

  ~ThreadPool() { end(); }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return n_threads_; }

  // Calls body(worker) on every thread, the calling one being worker 0, and waits for all.
  // The body must not throw and allocates nothing.
  template <class Body>
  void run(const Body& body) {
    call_ = [](const void* context, int worker) { (*static_cast<const Body*>(context))(worker); };
    context_ = &body;
    if (team_) return team_(n_threads_, call_, context_);
    left_.store(n_threads_ - 1, std::memory_order_relaxed);
    start();
    body(0);
    for (int i = 0; i < kSpins && left_.load(std::memory_order_acquire) > 0; ++i) pause();
    // Asleep, it leaves its processor to a thread that has none.
    for (int left; (left = left_.load(std::memory_order_acquire)) > 0;)
      left_.wait(left, std::memory_order_acquire);
  }

 private:
  // About 100 microseconds: longer than anything between two pieces of one token.
  static constexpr int kSpins = 4000;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void end() {
    stop_ = true;
    start();
    for (auto& thread : threads_) thread.join();
  }

  void start() {
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  }

  void work(int worker) {
    for (uint32_t seen = 0;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i)
        pause();
      generation_.wait(seen, std::memory_order_acquire);
      ++seen;
      if (stop_) return;
      call_(context_, worker);
      if (left_.fetch_sub(1, std::memory_order_release) == 1) left_.notify_one();
    }
  }

  int n_threads_;
  Team team_;
  std::vector<std::thread> threads_;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> left_{0};
  bool stop_ = false;
  void (*call_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
};

}  // namespace fallow
