// Reader for GGUF v2/v3 headers. Every count and offset is checked against the file's size before it
// is used, so that a truncated or hostile file ends in an exception and nothing else. Names and values
// stay where they are in the file: a header takes less memory than the file's bytes, whatever it has.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace fallow {

struct GgufError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The types of metadata, by their numbers in the file.
enum GgufType : uint32_t {
  kGgufUint8 = 0, kGgufInt8, kGgufUint16, kGgufInt16, kGgufUint32, kGgufInt32, kGgufFloat32, kGgufBool,
  kGgufString, kGgufArray, kGgufUint64, kGgufInt64, kGgufFloat64,
};

using GgufScalar = std::variant<uint64_t, int64_t, double, bool, std::string_view>;

// Names and values are parts of the file that parse_gguf was given, and live as long.
struct GgufField {
  std::string_view name;
  uint32_t type = 0;  // of the value, or of an array's items; never kGgufArray
  bool is_array = false;
  uint64_t count = 1;
  std::string_view bytes;  // of all values

  // The value at i, below count; of strings only the first.
  GgufScalar at(uint64_t i) const;
  // Of an array of strings. Throws GgufError if the file's bytes changed meanwhile.
  void each_string(const std::function<void(std::string_view)>& use) const;
};

struct GgufTensor {
  std::string_view name;
  uint32_t n_dims = 0;
  uint32_t type = 0;  // ggml type id
  std::array<uint64_t, 4> dims{};
  uint64_t offset = 0;   // from the start of the file
  uint64_t n_bytes = 0;

  // Outermost first: (out, in), the reverse of the order in the file.
  std::span<const uint64_t> shape() const { return {dims.data(), n_dims}; }
};

struct GgufHeader {
  uint32_t version = 0;
  std::vector<GgufField> fields;
  std::vector<GgufTensor> tensors;
  std::vector<size_t> fields_by_name, tensors_by_name;  // indexes, in the order of the names

  // Null if there is none.
  const GgufField* find_field(std::string_view name) const;
  const GgufTensor* find_tensor(std::string_view name) const;
};

// Parses the header in data[0, size). Throws GgufError naming what is wrong and at which byte.
GgufHeader parse_gguf(const uint8_t* data, uint64_t size);

}  // namespace fallow
