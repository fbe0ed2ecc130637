// Weights that do not fit into memory. Those that stay lie in an image of the file, anonymous memory in
// which every byte has the place that it has in the file, so that packed.h reads it as it reads the
// mapped file. The others pass through a few slots, read ahead in the order in which every pass over
// the model needs them. Nothing goes through the page cache where the file system lets that be.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fallow {

struct DiskError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Of a file: direct reads begin and end at multiples of this.
constexpr uint64_t kSector = 4096;

struct Extent {
  uint64_t offset, size;  // bytes; offset a multiple of kSector

  // Of memory: whole sectors.
  uint64_t room() const { return (size + kSector - 1) / kSector * kSector; }
};

// A file that must not change while it is open.
class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  uint64_t size() const { return size_; }
  // Reads an extent into `to`, which has room for whole sectors and begins at one. Throws DiskError.
  void read(const Extent& from, uint8_t* to) const;
  // Throws DiskError if the file was written to, cut or replaced in place.
  void check_unchanged() const;

 private:
  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
  uint64_t size_ = 0;
  int64_t changed_ = 0;  // nanoseconds
};

// Anonymous memory, zero and not resident until it is written to.
class Pages {
 public:
  explicit Pages(uint64_t size);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  uint8_t* data() const { return data_; }
  // Gives whole pages inside [offset, offset + size) back; they read as zero.
  void forget(uint64_t offset, uint64_t size);

 private:
  uint8_t* data_;
  uint64_t size_;
};

// Single rows of a matrix in a file, of row_bytes each from `offset` on.
class RowReader {
 public:
  RowReader(const File& file, uint64_t offset, uint64_t row_bytes);
  // Valid until the next call. Throws DiskError.
  const uint8_t* row(uint64_t index);

 private:
  const File& file_;
  uint64_t offset_, row_bytes_;
  Pages pages_;
};

// Reads extents to their own places in `image`, with several threads.
void load(const File& file, const std::vector<Extent>& extents, uint8_t* image);

// Units of extents, read ahead round and round: unit 0, 1, ..., n - 1, 0, ...
class Streamer {
 public:
  Streamer(const File& file, std::vector<std::vector<Extent>> units, size_t n_slots);
  ~Streamer();

  // Waits for a unit and returns where its extents lie, one after the other. The caller asks for
  // unit 0, 1, ... in turn and says when it is done with each; another order starts over there.
  // Throws DiskError.
  const uint8_t* wait(size_t unit);
  void done();

  // Since the last reset_stats.
  uint64_t bytes_read() const { return bytes_read_; }
  uint64_t waits() const { return waits_; }    // units asked for
  uint64_t in_time() const { return in_time_; }  // of these, what was there
  void reset_stats();

 private:
  struct Slot {
    std::unique_ptr<Pages> pages;
    size_t left = 0;  // pieces still to be read
  };
  struct Piece {
    Extent from;
    uint64_t at;  // in the slot
  };

  void work();
  void start_at(std::unique_lock<std::mutex>& lock, uint64_t sequence);

  const File& file_;
  std::vector<std::vector<Piece>> units_;
  std::vector<Slot> slots_;

  std::mutex mutex_;
  std::condition_variable readable_, ready_;
  // Units are counted on and on: the one that is asked for next, the oldest not done with, and the
  // piece of a unit to read next.
  uint64_t next_ = 0, oldest_ = 0, reading_ = 0;
  size_t piece_ = 0, in_flight_ = 0;
  bool stop_ = false;
  std::string error_;
  uint64_t bytes_read_ = 0, waits_ = 0, in_time_ = 0;
  std::vector<std::thread> readers_;
};

}  // namespace fallow
