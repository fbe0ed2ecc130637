// Files, memory and processes as the operating system has them: all that is not portable is here and in
// mapping.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fallow {

struct DiskError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A file's sector: direct reads begin and end at multiples of it.
constexpr uint64_t kSector = 4096;

struct Extent {
  uint64_t offset, size;  // bytes; offset a multiple of kSector

  // Bytes of memory that it takes: whole sectors.
  uint64_t room() const { return (size + kSector - 1) / kSector * kSector; }
};

// A file that must not change while it is open.
class File {
 public:
  // `direct`: past the page cache, where the file system lets that be.
  File(const std::string& path, bool direct);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return fd_; }
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
  uint64_t size() const { return size_; }
  // That all of [offset, offset + size) will be resident: huge pages inside it take no more memory then.
  void expect(uint64_t offset, uint64_t size);
  // Gives whole pages inside [offset, offset + size) back; they read as zero.
  void forget(uint64_t offset, uint64_t size);

 private:
  uint8_t* data_;
  uint64_t size_;
};

// The number by which the system knows this process.
int64_t process_id();

}  // namespace fallow
