#include "formats/gguf.h"

#include <algorithm>
#include <cstring>

#include "formats/dequant.h"

namespace fallow {
namespace {

// As Python decodes it: neither longer than need be, nor half of a UTF-16 pair, nor past U+10FFFF.
// https://www.unicode.org/versions/Unicode16.0.0/core-spec/chapter-3/#G27506 (table 3-7)
bool is_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t k) { return static_cast<uint8_t>(i + k < text.size() ? text[i + k] : 0); };
    const uint8_t first = byte(0);
    const size_t n = first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
    if (n == 0) return false;
    for (size_t k = 1; k < n; ++k)
      if ((byte(k) & 0xC0) != 0x80) return false;
    const uint8_t second = byte(1);
    if ((first == 0xE0 && second < 0xA0) || (first == 0xED && second > 0x9F) || (first == 0xF0 && second < 0x90) ||
        (first == 0xF4 && second > 0x8F))
      return false;
    i += n;
  }
  return true;
}

// A cursor that refuses to leave the file.
class Cursor {
 public:
  explicit Cursor(std::string_view file) : file_(file) {}

  template <class T>
  T read(const char* what) {
    T value;
    std::memcpy(&value, read_bytes(sizeof value, what).data(), sizeof value);
    return value;
  }

  std::string_view read_string(const char* what) {
    const auto length = read<uint64_t>(what);
    const std::string_view text = read_bytes(length, what);
    if (!is_utf8(text))
      throw GgufError(std::string(what) + " at byte " + std::to_string(pos_ - length) + " is not UTF-8");
    return text;
  }

  std::string_view read_bytes(uint64_t length, const char* what) {
    require(length, what);
    pos_ += length;
    return since(pos_ - length);
  }

  void require(uint64_t n, const char* what) const {
    if (n > left())
      throw GgufError(std::string("truncated: ") + what + " at byte " + std::to_string(pos_) +
                      " needs " + std::to_string(n) + " bytes, the file has " +
                      std::to_string(left()) + " left");
  }

  std::string_view since(uint64_t begin) const { return file_.substr(begin, pos_ - begin); }
  uint64_t pos() const { return pos_; }
  uint64_t left() const { return file_.size() - pos_; }

 private:
  std::string_view file_;
  uint64_t pos_ = 0;
};

// 0 of what has no fixed size, or is unknown.
uint64_t size_of(uint32_t type) {
  switch (type) {
    case kGgufUint8: case kGgufInt8: case kGgufBool: return 1;
    case kGgufUint16: case kGgufInt16: return 2;
    case kGgufUint32: case kGgufInt32: case kGgufFloat32: return 4;
    case kGgufUint64: case kGgufInt64: case kGgufFloat64: return 8;
    default: return 0;
  }
}

GgufField read_field(Cursor& in) {
  GgufField field;
  field.name = in.read_string("metadata key");
  field.type = in.read<uint32_t>("metadata type");
  if (field.type == kGgufArray) {
    field.is_array = true;
    field.type = in.read<uint32_t>("array type");
    field.count = in.read<uint64_t>("array length");
    if (field.type == kGgufArray)
      throw GgufError("metadata " + std::string(field.name) + " is an array of arrays, which no model has");
    // Every item takes at least one byte: a count beyond that is a lie, and its size may overflow.
    in.require(field.count, "array");
  }
  const uint64_t begin = in.pos();
  if (field.type == kGgufString) {
    for (uint64_t i = 0; i < field.count; ++i) in.read_string("metadata string");
  } else if (const uint64_t size = size_of(field.type)) {
    in.read_bytes(field.count * size, "metadata value");
  } else {
    throw GgufError("unknown metadata type " + std::to_string(field.type) + " before byte " +
                    std::to_string(in.pos()));
  }
  field.bytes = in.since(begin);
  if (field.type == kGgufBool && field.bytes.find_first_not_of(std::string_view("\0\1", 2)) != field.bytes.npos)
    throw GgufError("metadata " + std::string(field.name) + " has a truth value that is neither 0 nor 1");
  return field;
}

GgufTensor read_tensor(Cursor& in) {
  GgufTensor tensor;
  tensor.name = in.read_string("tensor name");
  const std::string name(tensor.name);
  tensor.n_dims = in.read<uint32_t>("tensor dimensions");
  if (tensor.n_dims < 1 || tensor.n_dims > tensor.dims.size())
    throw GgufError("tensor " + name + " has " + std::to_string(tensor.n_dims) +
                    " dimensions, expected 1 to 4");
  uint64_t elements = 1;
  for (uint32_t d = 0; d < tensor.n_dims; ++d) {
    const auto dim = in.read<uint64_t>("tensor shape");
    if (dim == 0 || dim > (uint64_t{1} << 40) / elements)
      throw GgufError("tensor " + name + " has an impossible shape (dimension " +
                      std::to_string(d) + " is " + std::to_string(dim) + ")");
    elements *= dim;
    tensor.dims[tensor.n_dims - 1 - d] = dim;
  }
  tensor.type = in.read<uint32_t>("tensor type");
  tensor.offset = in.read<uint64_t>("tensor offset");
  const BlockFormat* format = find_format(tensor.type);
  if (!format)
    throw GgufError("tensor " + name + " has unknown ggml type " + std::to_string(tensor.type));
  const uint64_t row = tensor.shape().back();
  if (row % format->block_size != 0)
    throw GgufError("tensor " + name + ": row length " + std::to_string(row) +
                    " is not a multiple of the block size " + std::to_string(format->block_size) +
                    " of " + format->name);
  tensor.n_bytes = elements / format->block_size * format->block_bytes;
  return tensor;
}

// Throws GgufError for a name that two of them have.
template <class Named>
std::vector<size_t> order_by_name(const std::vector<Named>& all, const char* what) {
  std::vector<size_t> order(all.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::ranges::sort(order, {}, [&](size_t i) { return all[i].name; });
  for (size_t i = 1; i < order.size(); ++i)
    if (all[order[i]].name == all[order[i - 1]].name)
      throw GgufError(what + std::string(all[order[i]].name) + " appears twice");
  return order;
}

template <class Named>
const Named* find(const std::vector<Named>& all, const std::vector<size_t>& order, std::string_view name) {
  const auto found = std::ranges::lower_bound(order, name, {}, [&](size_t i) { return all[i].name; });
  return found != order.end() && all[*found].name == name ? &all[*found] : nullptr;
}

uint64_t find_alignment(const GgufHeader& header) {
  const GgufField* field = header.find_field("general.alignment");
  if (!field) return 32;  // the format's default
  const GgufScalar found = field->is_array ? GgufScalar{} : field->at(0);
  const auto* value = std::get_if<uint64_t>(&found);
  if (!value || *value == 0 || *value > (1u << 20) || (*value & (*value - 1)) != 0)
    throw GgufError("general.alignment is not a power of two");
  return *value;
}

}  // namespace

GgufScalar GgufField::at(uint64_t i) const {
  const auto read = [&]<class T>(T value) {
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    return value;
  };
  switch (type) {
    case kGgufUint8: return uint64_t{read(uint8_t{})};
    case kGgufInt8: return int64_t{read(int8_t{})};
    case kGgufUint16: return uint64_t{read(uint16_t{})};
    case kGgufInt16: return int64_t{read(int16_t{})};
    case kGgufUint32: return uint64_t{read(uint32_t{})};
    case kGgufInt32: return int64_t{read(int32_t{})};
    case kGgufFloat32: return double{read(float{})};
    case kGgufBool: return read(uint8_t{}) != 0;
    case kGgufUint64: return read(uint64_t{});
    case kGgufInt64: return read(int64_t{});
    case kGgufFloat64: return read(double{});
    default: return bytes.substr(sizeof(uint64_t));
  }
}

void GgufField::each_string(const std::function<void(std::string_view)>& use) const {
  Cursor in(bytes);
  for (uint64_t i = 0; i < count; ++i) use(in.read_string("metadata string"));
}

const GgufField* GgufHeader::find_field(std::string_view name) const {
  return find(fields, fields_by_name, name);
}

const GgufTensor* GgufHeader::find_tensor(std::string_view name) const {
  return find(tensors, tensors_by_name, name);
}

GgufHeader parse_gguf(const uint8_t* data, uint64_t size) {
  Cursor in({reinterpret_cast<const char*>(data), size});
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
  header.fields.reserve(n_fields);
  for (uint64_t i = 0; i < n_fields; ++i) header.fields.push_back(read_field(in));
  header.fields_by_name = order_by_name(header.fields, "metadata ");
  header.tensors.reserve(n_tensors);
  for (uint64_t i = 0; i < n_tensors; ++i) header.tensors.push_back(read_tensor(in));
  header.tensors_by_name = order_by_name(header.tensors, "tensor ");

  const uint64_t alignment = find_alignment(header);
  const uint64_t data_start = (in.pos() + alignment - 1) / alignment * alignment;
  for (auto& tensor : header.tensors) {
    const std::string name(tensor.name);
    if (tensor.offset % alignment != 0)
      throw GgufError("tensor " + name + " is not aligned to " + std::to_string(alignment));
    if (data_start > size || tensor.offset > size - data_start ||
        tensor.n_bytes > size - data_start - tensor.offset)
      throw GgufError("truncated: tensor " + name + " lies outside the file of " +
                      std::to_string(size) + " bytes");
    tensor.offset += data_start;
  }
  std::vector<const GgufTensor*> in_order;
  in_order.reserve(header.tensors.size());
  for (const auto& tensor : header.tensors) in_order.push_back(&tensor);
  std::ranges::sort(in_order, {}, &GgufTensor::offset);
  for (size_t i = 1; i < in_order.size(); ++i) {
    const GgufTensor &before = *in_order[i - 1], &after = *in_order[i];
    if (before.offset + before.n_bytes > after.offset)
      throw GgufError("tensors " + std::string(before.name) + " and " + std::string(after.name) + " overlap");
  }
  return header;
}

}  // namespace fallow
