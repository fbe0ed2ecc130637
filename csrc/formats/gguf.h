// Reader for GGUF v2/v3 headers. Every count and offset is checked against the file's size before it
// is used, so that a truncated or hostile file ends in an exception and nothing else.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace fallow {

struct GgufError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using GgufScalar = std::variant<uint64_t, int64_t, double, bool, std::string>;

struct GgufField {
  std::string name;
  bool is_array = false;
  bool is_bytes = false;           // an array of uint8, which lies in `bytes`: a scalar takes 40
  std::vector<GgufScalar> values;  // exactly one unless is_array
  std::string bytes;
};

struct GgufTensor {
  std::string name;
  std::vector<uint64_t> shape;  // outermost first: (out, in), the reverse of the order in the file
  uint32_t type = 0;            // ggml type id
  uint64_t offset = 0;          // from the start of the file
  uint64_t n_bytes = 0;
};

struct GgufHeader {
  uint32_t version = 0;
  std::vector<GgufField> fields;
  std::vector<GgufTensor> tensors;
};

// Parses the header in data[0, size). Throws GgufError naming what is wrong and at which byte.
GgufHeader parse_gguf(const uint8_t* data, uint64_t size);

}  // namespace fallow
