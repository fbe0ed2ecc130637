#include "formats/gguf.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "formats/dequant.h"

namespace fallow {
namespace {

enum ValueType : uint32_t {
  kUint8 = 0, kInt8, kUint16, kInt16, kUint32, kInt32, kFloat32, kBool, kString, kArray,
  kUint64, kInt64, kFloat64,
};

// A cursor that refuses to leave the file.
class Cursor {
 public:
  Cursor(const uint8_t* data, uint64_t size) : data_(data), size_(size) {}

  template <class T>
  T read(const char* what) {
    require(sizeof(T), what);
    T value;
    std::memcpy(&value, data_ + pos_, sizeof(T));
    pos_ += sizeof(T);
    return value;
  }

  std::string read_string(const char* what) {
    const auto length = read<uint64_t>(what);
    return read_bytes(length, what);
  }

  std::string read_bytes(uint64_t length, const char* what) {
    require(length, what);
    std::string text(reinterpret_cast<const char*>(data_ + pos_), length);
    pos_ += length;
    return text;
  }

  void require(uint64_t n, const char* what) const {
    if (n > size_ - pos_)
      throw GgufError(std::string("truncated: ") + what + " at byte " + std::to_string(pos_) +
                      " needs " + std::to_string(n) + " bytes, the file has " +
                      std::to_string(size_ - pos_) + " left");
  }

  uint64_t pos() const { return pos_; }
  uint64_t left() const { return size_ - pos_; }

 private:
  const uint8_t* data_;
  uint64_t size_;
  uint64_t pos_ = 0;
};

GgufScalar read_scalar(Cursor& in, uint32_t type) {
  switch (type) {
    case kUint8: return uint64_t{in.read<uint8_t>("metadata value")};
    case kInt8: return int64_t{in.read<int8_t>("metadata value")};
    case kUint16: return uint64_t{in.read<uint16_t>("metadata value")};
    case kInt16: return int64_t{in.read<int16_t>("metadata value")};
    case kUint32: return uint64_t{in.read<uint32_t>("metadata value")};
    case kInt32: return int64_t{in.read<int32_t>("metadata value")};
    case kFloat32: return double{in.read<float>("metadata value")};
    case kBool: return in.read<uint8_t>("metadata value") != 0;
    case kString: return in.read_string("metadata string");
    case kUint64: return in.read<uint64_t>("metadata value");
    case kInt64: return in.read<int64_t>("metadata value");
    case kFloat64: return in.read<double>("metadata value");
    default:
      throw GgufError("unknown metadata type " + std::to_string(type) + " before byte " +
                      std::to_string(in.pos()));
  }
}

GgufField read_field(Cursor& in) {
  GgufField field;
  field.name = in.read_string("metadata key");
  const auto type = in.read<uint32_t>("metadata type");
  if (type != kArray) {
    field.values.push_back(read_scalar(in, type));
    return field;
  }
  field.is_array = true;
  const auto item_type = in.read<uint32_t>("array type");
  const auto count = in.read<uint64_t>("array length");
  // Every item takes at least one byte: a count beyond that is a lie, and is not allocated. The
  // largest arrays are vocabularies and merges, below a million.
  in.require(count, "array");
  if (count > (1u << 24))
    throw GgufError("metadata " + field.name + " has " + std::to_string(count) + " items");
  if (item_type == kUint8) {
    field.is_bytes = true;
    field.bytes = in.read_bytes(count, "array");
    return field;
  }
  field.values.reserve(count);
  for (uint64_t i = 0; i < count; ++i) field.values.push_back(read_scalar(in, item_type));
  return field;
}

GgufTensor read_tensor(Cursor& in) {
  GgufTensor tensor;
  tensor.name = in.read_string("tensor name");
  const auto n_dims = in.read<uint32_t>("tensor dimensions");
  if (n_dims < 1 || n_dims > 4)
    throw GgufError("tensor " + tensor.name + " has " + std::to_string(n_dims) +
                    " dimensions, expected 1 to 4");
  uint64_t elements = 1;
  for (uint32_t d = 0; d < n_dims; ++d) {
    const auto dim = in.read<uint64_t>("tensor shape");
    if (dim == 0 || dim > (uint64_t{1} << 40) / elements)
      throw GgufError("tensor " + tensor.name + " has an impossible shape (dimension " +
                      std::to_string(d) + " is " + std::to_string(dim) + ")");
    elements *= dim;
    tensor.shape.insert(tensor.shape.begin(), dim);
  }
  tensor.type = in.read<uint32_t>("tensor type");
  tensor.offset = in.read<uint64_t>("tensor offset");
  const BlockFormat* format = find_format(tensor.type);
  if (!format)
    throw GgufError("tensor " + tensor.name + " has unknown ggml type " +
                    std::to_string(tensor.type));
  if (tensor.shape.back() % format->block_size != 0)
    throw GgufError("tensor " + tensor.name + ": row length " +
                    std::to_string(tensor.shape.back()) + " is not a multiple of the block size " +
                    std::to_string(format->block_size) + " of " + format->name);
  tensor.n_bytes = elements / format->block_size * format->block_bytes;
  return tensor;
}

uint64_t find_alignment(const std::vector<GgufField>& fields) {
  for (const auto& field : fields) {
    if (field.name != "general.alignment" || field.is_array) continue;
    const auto* value = std::get_if<uint64_t>(&field.values[0]);
    if (!value || *value == 0 || *value > (1u << 20) || (*value & (*value - 1)) != 0)
      throw GgufError("general.alignment is not a power of two");
    return *value;
  }
  return 32;  // the format's default
}

}  // namespace

GgufHeader parse_gguf(const uint8_t* data, uint64_t size) {
  Cursor in(data, size);
  if (in.read<uint32_t>("magic") != 0x46554747u) throw GgufError("wrong magic: not a GGUF file");
  GgufHeader header;
  header.version = in.read<uint32_t>("version");
  // The magic is written the same way in both byte orders, the version is not: 3 is then 3 << 24.
  if (header.version != 0 && (header.version & 0xffff) == 0)
    throw GgufError("the file is big-endian, which gguf-convert-endian changes");
  if (header.version != 2 && header.version != 3)
    throw GgufError("GGUF version " + std::to_string(header.version) +
                    " is not supported (2 and 3 are)");
  const auto n_tensors = in.read<uint64_t>("tensor count");
  const auto n_fields = in.read<uint64_t>("metadata count");
  // A metadata entry takes at least 13 bytes, a tensor entry at least 32.
  if (n_fields > in.left() / 13 || n_tensors > in.left() / 32)
    throw GgufError("truncated: the header announces " + std::to_string(n_fields) +
                    " metadata entries and " + std::to_string(n_tensors) +
                    " tensors, more than the file can hold");
  std::unordered_set<std::string> names;
  for (uint64_t i = 0; i < n_fields; ++i) {
    header.fields.push_back(read_field(in));
    if (!names.insert(header.fields.back().name).second)
      throw GgufError("metadata " + header.fields.back().name + " appears twice");
  }
  for (uint64_t i = 0; i < n_tensors; ++i) header.tensors.push_back(read_tensor(in));

  const uint64_t alignment = find_alignment(header.fields);
  const uint64_t data_start = (in.pos() + alignment - 1) / alignment * alignment;
  names.clear();
  for (auto& tensor : header.tensors) {
    if (!names.insert(tensor.name).second)
      throw GgufError("tensor " + tensor.name + " appears twice");
    if (tensor.offset % alignment != 0)
      throw GgufError("tensor " + tensor.name + " is not aligned to " + std::to_string(alignment));
    if (data_start > size || tensor.offset > size - data_start ||
        tensor.n_bytes > size - data_start - tensor.offset)
      throw GgufError("truncated: tensor " + tensor.name + " lies outside the file of " +
                      std::to_string(size) + " bytes");
    tensor.offset += data_start;
  }
  std::vector<const GgufTensor*> in_order;
  for (const auto& tensor : header.tensors) in_order.push_back(&tensor);
  std::ranges::sort(in_order, {}, &GgufTensor::offset);
  for (size_t i = 1; i < in_order.size(); ++i) {
    const GgufTensor &before = *in_order[i - 1], &after = *in_order[i];
    if (before.offset + before.n_bytes > after.offset)
      throw GgufError("tensors " + before.name + " and " + after.name + " overlap");
  }
  return header;
}

}  // namespace fallow
