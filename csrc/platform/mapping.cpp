// On systems such as Linux and macOS.
#ifndef _WIN32
#include "platform/mapping.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <mutex>

namespace fallow {
namespace {

// What the handler of SIGBUS may look at: no lock, no allocation. An entry is free while `begin` is 0.
struct Entry {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> lost{false};
};
Entry entries[1024];
std::mutex registering;
struct sigaction before;

// Puts zeros in place of the page that could not be read and of all that follow it in its mapping. Signals
// from elsewhere go to whoever handled them before.
void on_bus_error(int signal, siginfo_t* info, void* context) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Entry& entry : entries) {
    const uintptr_t begin = entry.begin.load(), end = entry.end.load();
    if (begin == 0 || at < begin || at >= end) continue;
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t from = at / page * page;
    if (mmap(reinterpret_cast<void*>(from), end - from, PROT_READ,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
      break;
    entry.lost = true;
    return;
  }
  if ((before.sa_flags & SA_SIGINFO) && before.sa_sigaction) {
    before.sa_sigaction(signal, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal);
  } else {
    sigaction(signal, &before, nullptr);  // the read is tried again, and ends the process
  }
}

void install_handler() {
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &before);
}

}  // namespace

Mapping::Mapping(const std::string& path) : file_(path, false) {
  void* found = mmap(nullptr, file_.size(), PROT_READ, MAP_SHARED, file_.descriptor(), 0);
  if (found == MAP_FAILED) throw DiskError("cannot map " + path + ": " + std::strerror(errno));
  data_ = static_cast<const uint8_t*>(found);
  static std::once_flag installed;
  std::call_once(installed, install_handler);
  const std::lock_guard lock(registering);
  while (entry_ < std::size(entries) && entries[entry_].begin.load() != 0) ++entry_;
  if (entry_ == std::size(entries)) return;  // more mappings than any program has: not guarded
  Entry& entry = entries[entry_];
  entry.lost = false;
  entry.end = reinterpret_cast<uintptr_t>(data_) + size();
  entry.begin = reinterpret_cast<uintptr_t>(data_);
}

Mapping::~Mapping() {
  if (entry_ < std::size(entries)) entries[entry_].begin = 0;
  munmap(const_cast<uint8_t*>(data_), size());
}

void Mapping::forget() { madvise(const_cast<uint8_t*>(data_), size(), MADV_DONTNEED); }

void Mapping::check() const {
  file_.check_unchanged();
  if (entry_ < std::size(entries) && entries[entry_].lost)
    throw DiskError(file_.path() + " could not be read; is its disk failing?");
}

}  // namespace fallow
#endif
