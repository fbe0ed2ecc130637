// On systems such as Linux and macOS.
#ifndef _WIN32
#include "platform/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace fallow {
namespace {

// The huge pages of x86-64, and of Arm with 4 KB pages. Without them decode took 5 % longer than from
// the mapped file, whose page cache ext4 keeps in large pieces.
constexpr uint64_t kHugePage = 2 << 20;

std::string reason(int error) { return std::strerror(error); }

int64_t time_of(const struct stat& s) {
#ifdef __APPLE__
  const struct timespec at = s.st_mtimespec;
#else
  const struct timespec at = s.st_mtim;
#endif
  return int64_t{at.tv_sec} * 1'000'000'000 + at.tv_nsec;
}

int open_direct(const char* path) {
#ifdef O_DIRECT
  return open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
#else
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd >= 0) fcntl(fd, F_NOCACHE, 1);
  return fd;
#endif
}

}  // namespace

File::File(const std::string& path, bool direct) : path_(path) {
  fd_ = direct ? open_direct(path.c_str()) : open(path.c_str(), O_RDONLY | O_CLOEXEC);
  direct_ = direct && fd_ >= 0;
  if (direct && fd_ < 0 && errno == EINVAL) fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);  // tmpfs
  if (fd_ < 0) throw DiskError("cannot open " + path + ": " + reason(errno));
  struct stat s;
  if (fstat(fd_, &s) != 0) {
    const int error = errno;
    close(fd_);
    throw DiskError("cannot look at " + path + ": " + reason(error));
  }
  size_ = static_cast<uint64_t>(s.st_size);
  changed_ = time_of(s);
}

File::~File() { close(fd_); }

void File::read(const Extent& from, uint8_t* to) const {
  // The last sector of a file may be a part of one.
  const uint64_t room = from.room();
  for (uint64_t done = 0, before = 0; done < from.size; before = done) {
    const ssize_t n = pread(fd_, to + done, room - done, static_cast<off_t>(from.offset + done));
    if (n < 0 && errno == EINTR) continue;
    const std::string where = path_ + " at byte " + std::to_string(from.offset + done);
    if (n < 0) throw DiskError("cannot read " + where + ": " + reason(errno));
    if (n == 0) throw DiskError(where + " ends too early; was it cut? Pack it again");
    done += static_cast<uint64_t>(n);
    // A direct read goes on at a sector; what lies before it is read again.
    if (direct_ && done < from.size) done = done / kSector * kSector;
    if (done == before) throw DiskError("cannot read " + where + ": only parts of sectors come");
  }
}

void File::check_unchanged() const {
  struct stat s;
  if (fstat(fd_, &s) != 0) throw DiskError("cannot look at " + path_ + ": " + reason(errno));
  if (time_of(s) != changed_ || static_cast<uint64_t>(s.st_size) != size_)
    throw DiskError(path_ + " was written to while it was running; start again");
}

Pages::Pages(uint64_t size) : size_(size) {
  void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) throw DiskError("no address space for the model: " + reason(errno));
  data_ = static_cast<uint8_t*>(found);
}

Pages::~Pages() { munmap(data_, size_); }

void Pages::expect(uint64_t offset, uint64_t size) {
#ifdef MADV_HUGEPAGE
  const auto at = reinterpret_cast<uintptr_t>(data_) + offset;
  const uintptr_t first = (at + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (at + size) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)offset, (void)size, (void)kHugePage;
#endif
}

void Pages::forget(uint64_t offset, uint64_t size) {
  const uint64_t first = (offset + kSector - 1) / kSector * kSector;
  const uint64_t last = (offset + size) / kSector * kSector;
  if (first >= last) return;
#ifdef __linux__
  madvise(data_ + first, last - first, MADV_DONTNEED);
#else  // where that may leave old values
  mmap(data_ + first, last - first, PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
#endif
}

int64_t process_id() { return getpid(); }

}  // namespace fallow
#endif
