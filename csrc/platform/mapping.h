// A file that is mapped into memory. Reading a page that the file has lost, or that the disk cannot give,
// raises SIGBUS, which would end the process; here such pages read as zeros, and check() tells of it.
#pragma once

#include <atomic>

#include "platform/file.h"

namespace fallow {

class Mapping {
 public:
  // Throws DiskError.
  explicit Mapping(const std::string& path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const File& file() const { return file_; }
  const uint8_t* data() const { return data_; }
  uint64_t size() const { return file_.size(); }
  // Lets go of what was read; it is read again when it is used.
  void forget();
  // Throws DiskError if the file was cut or written to since it was mapped, or could not be read.
  void check() const;

 private:
  File file_;
  const uint8_t* data_ = nullptr;
  size_t entry_ = 0;  // in the table of mappings that the handler of SIGBUS looks at
};

}  // namespace fallow
