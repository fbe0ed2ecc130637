#include "disk.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace fallow {
namespace {

// Read at once, and by how many threads: where one thread read 1.5 to 2.7 GB/s of 4 MB pieces, four
// read 1.9 to 2.1 of 1 MB and do not depend on the file system's own reading ahead.
constexpr uint64_t kPiece = 1 << 20;
constexpr int kReaders = 4;

std::string reason(int error) { return std::strerror(error); }

int64_t time_of(const struct stat& s) {
  return int64_t{s.st_mtim.tv_sec} * 1'000'000'000 + s.st_mtim.tv_nsec;
}

// Calls use(piece, offset from the extent's start) for parts of at most kPiece bytes.
template <class Use>
void for_pieces(const Extent& extent, const Use& use) {
  for (uint64_t done = 0; done < extent.size; done += kPiece)
    use(Extent{extent.offset + done, std::min(kPiece, extent.size - done)}, done);
}

}  // namespace

File::File(const std::string& path) : path_(path) {
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  direct_ = fd_ >= 0;
  if (!direct_ && errno == EINVAL) fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);  // tmpfs, say
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

void Pages::forget(uint64_t offset, uint64_t size) {
  const uint64_t first = (offset + kSector - 1) / kSector * kSector;
  const uint64_t last = (offset + size) / kSector * kSector;
  if (first < last) madvise(data_ + first, last - first, MADV_DONTNEED);
}

RowReader::RowReader(const File& file, uint64_t offset, uint64_t row_bytes)
    : file_(file), offset_(offset), row_bytes_(row_bytes), pages_(row_bytes + 2 * kSector) {}

const uint8_t* RowReader::row(uint64_t index) {
  const uint64_t begin = offset_ + index * row_bytes_, first = begin / kSector * kSector;
  file_.read({first, begin + row_bytes_ - first}, pages_.data());
  return pages_.data() + (begin - first);
}

void load(const File& file, const std::vector<Extent>& extents, uint8_t* image) {
  std::vector<Extent> pieces;
  for (const Extent& extent : extents)
    for_pieces(extent, [&](const Extent& piece, uint64_t) { pieces.push_back(piece); });
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    for (size_t i; (i = next++) < pieces.size();) {
      try {
        file.read(pieces[i], image + pieces[i].offset);
      } catch (const DiskError& e) {
        const std::lock_guard lock(mutex);
        error = e.what();
        next = pieces.size();
      }
    }
  };
  std::vector<std::thread> readers;
  for (int i = 0; i < kReaders; ++i) readers.emplace_back(work);
  for (std::thread& reader : readers) reader.join();
  if (!error.empty()) throw DiskError(error);
}

Streamer::Streamer(const File& file, std::vector<std::vector<Extent>> units, size_t n_slots)
    : file_(file), slots_(n_slots) {
  uint64_t largest = 0;
  for (const auto& extents : units) {
    uint64_t at = 0;
    std::vector<Piece> pieces;
    for (const Extent& extent : extents) {
      for_pieces(extent, [&](const Extent& piece, uint64_t done) {
        pieces.push_back({piece, at + done});
      });
      at += extent.room();
    }
    units_.push_back(std::move(pieces));
    largest = std::max(largest, at);
  }
  for (Slot& slot : slots_) slot.pages = std::make_unique<Pages>(largest);
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i].left = units_[i % units_.size()].size();
  for (int i = 0; i < kReaders; ++i) readers_.emplace_back([this] { work(); });
}

Streamer::~Streamer() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  readable_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

// Every reader takes the next piece as long as its unit has a slot: the slot of unit n is free when
// unit n - n_slots is done with.
void Streamer::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    readable_.wait(lock, [&] {
      return stop_ || (error_.empty() && reading_ < oldest_ + slots_.size());
    });
    if (stop_) return;
    const std::vector<Piece>& unit = units_[reading_ % units_.size()];
    Slot& slot = slots_[reading_ % slots_.size()];
    const Piece piece = unit[piece_];
    if (++piece_ == unit.size()) {
      piece_ = 0;
      ++reading_;
    }
    ++in_flight_;
    lock.unlock();
    std::string error;
    try {
      file_.read(piece.from, slot.pages->data() + piece.at);
    } catch (const DiskError& e) {
      error = e.what();
    }
    lock.lock();
    --in_flight_;
    if (!error.empty()) error_ = error;
    bytes_read_ += piece.from.size;
    --slot.left;
    ready_.notify_all();
  }
}

const uint8_t* Streamer::wait(size_t unit) {
  std::unique_lock lock(mutex_);
  // What failed while reading ahead is tried once more.
  if (!error_.empty() || next_ % units_.size() != unit)
    start_at(lock, (next_ / units_.size() + 1) * units_.size() + unit);
  Slot& slot = slots_[next_ % slots_.size()];
  ++waits_;
  // A unit that no reader has begun yet still counts all its pieces.
  if (slot.left == 0 && reading_ > next_) {
    ++in_time_;
  } else {
    ready_.wait(lock, [&] { return !error_.empty() || (slot.left == 0 && reading_ > next_); });
  }
  if (!error_.empty()) throw DiskError(error_);
  file_.check_unchanged();
  ++next_;
  return slot.pages->data();
}

void Streamer::done() {
  {
    const std::lock_guard lock(mutex_);
    Slot& slot = slots_[oldest_ % slots_.size()];
    slot.left = units_[(oldest_ + slots_.size()) % units_.size()].size();
    ++oldest_;
  }
  readable_.notify_all();
}

// Forgets what was read ahead and begins with this unit.
void Streamer::start_at(std::unique_lock<std::mutex>& lock, uint64_t sequence) {
  reading_ = oldest_ + slots_.size();  // nobody takes another piece
  ready_.wait(lock, [&] { return in_flight_ == 0; });
  next_ = oldest_ = reading_ = sequence;
  piece_ = 0;
  error_.clear();
  for (size_t i = 0; i < slots_.size(); ++i)
    slots_[(sequence + i) % slots_.size()].left = units_[(sequence + i) % units_.size()].size();
  readable_.notify_all();
}

void Streamer::reset_stats() {
  const std::lock_guard lock(mutex_);
  bytes_read_ = waits_ = in_time_ = 0;
}

}  // namespace fallow
