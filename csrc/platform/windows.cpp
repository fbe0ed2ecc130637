// What file.cpp and mapping.cpp are elsewhere. Cross-compiled (make cross), never run yet.
#ifdef _WIN32
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <fcntl.h>
#include <io.h>

#include <system_error>

#include "platform/mapping.h"

namespace fallow {
namespace {

std::string reason() { return std::system_category().message(static_cast<int>(GetLastError())); }

std::wstring wide(const std::string& utf8) {
  const int size = MultiByteToWideChar(CP_UTF8, 0, utf8.c_str(), -1, nullptr, 0);
  std::wstring found(static_cast<size_t>(size), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, utf8.c_str(), -1, found.data(), size);
  return found;
}

HANDLE handle_of(int descriptor) { return reinterpret_cast<HANDLE>(_get_osfhandle(descriptor)); }

uint64_t joined(DWORD high, DWORD low) { return uint64_t{high} << 32 | low; }

BY_HANDLE_FILE_INFORMATION look_at(int descriptor, const std::string& path) {
  BY_HANDLE_FILE_INFORMATION found;
  if (!GetFileInformationByHandle(handle_of(descriptor), &found))
    throw DiskError("cannot look at " + path + ": " + reason());
  return found;
}

int64_t time_of(const BY_HANDLE_FILE_INFORMATION& found) {
  return static_cast<int64_t>(
             joined(found.ftLastWriteTime.dwHighDateTime, found.ftLastWriteTime.dwLowDateTime)) *
         100;
}

}  // namespace

File::File(const std::string& path, bool direct) : path_(path), direct_(direct) {
  const DWORD flags = FILE_ATTRIBUTE_NORMAL | (direct ? FILE_FLAG_NO_BUFFERING : 0);
  HANDLE handle = CreateFileW(wide(path).c_str(), GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_DELETE, nullptr,
                              OPEN_EXISTING, flags, nullptr);
  if (handle == INVALID_HANDLE_VALUE) throw DiskError("cannot open " + path + ": " + reason());
  fd_ = _open_osfhandle(reinterpret_cast<intptr_t>(handle), _O_RDONLY | _O_BINARY);
  try {
    const auto found = look_at(fd_, path);
    size_ = joined(found.nFileSizeHigh, found.nFileSizeLow);
    changed_ = time_of(found);
  } catch (...) {
    _close(fd_);
    throw;
  }
}

File::~File() { _close(fd_); }

void File::read(const Extent& from, uint8_t* to) const {
  const uint64_t room = from.room();
  for (uint64_t done = 0, before = 0; done < from.size; before = done) {
    const uint64_t at = from.offset + done;
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(at);
    place.OffsetHigh = static_cast<DWORD>(at >> 32);
    const uint64_t wanted = room - done < (1u << 30) ? room - done : 1u << 30;
    DWORD n = 0;
    const bool fine = ReadFile(handle_of(fd_), to + done, static_cast<DWORD>(wanted), &n, &place);
    const std::string where = path_ + " at byte " + std::to_string(at);
    if (!fine && GetLastError() != ERROR_HANDLE_EOF) throw DiskError("cannot read " + where + ": " + reason());
    if (n == 0) throw DiskError(where + " ends too early; was it cut? Pack it again");
    done += n;
    if (direct_ && done < from.size) done = done / kSector * kSector;
    if (done == before) throw DiskError("cannot read " + where + ": only parts of sectors come");
  }
}

void File::check_unchanged() const {
  const auto found = look_at(fd_, path_);
  if (time_of(found) != changed_ || joined(found.nFileSizeHigh, found.nFileSizeLow) != size_)
    throw DiskError(path_ + " was written to while it was running; start again");
}

Pages::Pages(uint64_t size) : size_(size) {
  data_ = static_cast<uint8_t*>(VirtualAlloc(nullptr, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  if (data_ == nullptr) throw DiskError("no address space for the model: " + reason());
}

Pages::~Pages() { VirtualFree(data_, 0, MEM_RELEASE); }

void Pages::expect(uint64_t, uint64_t) {}  // large pages need a privilege that users do not have

void Pages::forget(uint64_t offset, uint64_t size) {
  const uint64_t first = (offset + kSector - 1) / kSector * kSector;
  const uint64_t last = (offset + size) / kSector * kSector;
  if (first >= last) return;
  VirtualFree(data_ + first, last - first, MEM_DECOMMIT);
  VirtualAlloc(data_ + first, last - first, MEM_COMMIT, PAGE_READWRITE);
}

int64_t process_id() { return static_cast<int64_t>(GetCurrentProcessId()); }

// A mapped file cannot be cut or written to by others here: it is opened without sharing that.
Mapping::Mapping(const std::string& path) : file_(path, false) {
  HANDLE mapping = CreateFileMappingW(handle_of(file_.descriptor()), nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (mapping == nullptr) throw DiskError("cannot map " + path + ": " + reason());
  data_ = static_cast<const uint8_t*>(MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0));
  const std::string why = data_ == nullptr ? reason() : "";
  CloseHandle(mapping);
  if (data_ == nullptr) throw DiskError("cannot map " + path + ": " + why);
}

Mapping::~Mapping() { UnmapViewOfFile(data_); }

void Mapping::forget() {}  // pages that are read only leave memory when others want it

void Mapping::check() const { file_.check_unchanged(); }

}  // namespace fallow
#endif
