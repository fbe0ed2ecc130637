#include "formats/dequant.h"

#include <cstring>
#include <iterator>

#include "formats/formats.h"
#include "parallel.h"

namespace fallow {
namespace {

void decode_f32(const uint8_t* b, uint64_t n, float* y) { std::memcpy(y, b, n * 4); }

void decode_f16(const uint8_t* b, uint64_t n, float* y) {
  for (uint64_t i = 0; i < n; ++i) y[i] = load_f16(b + 2 * i);
}

void decode_bf16(const uint8_t* b, uint64_t n, float* y) {
  for (uint64_t i = 0; i < n; ++i) y[i] = load_bf16(b + 2 * i);
}

// Formats whose size alone is known, so that a file which has them can be listed; the gguf package
// decodes them.
constexpr BlockFormat kSizesAlone[] = {
    {16, "IQ2_XXS", 256, 66, nullptr}, {17, "IQ2_XS", 256, 74, nullptr},
    {18, "IQ3_XXS", 256, 98, nullptr}, {19, "IQ1_S", 256, 50, nullptr},
    {21, "IQ3_S", 256, 110, nullptr},  {22, "IQ2_S", 256, 82, nullptr},
    {29, "IQ1_M", 256, 56, nullptr},   {34, "TQ1_0", 256, 54, nullptr},
    {35, "TQ2_0", 256, 66, nullptr},   {24, "I8", 1, 1, nullptr},
};

}  // namespace

const std::vector<BlockFormat>& all_formats() {
  static const std::vector<BlockFormat> formats = [] {
    std::vector<BlockFormat> found{{kF32, "F32", 1, 4, decode_f32},
                                   {kF16, "F16", 1, 2, decode_f16},
                                   {kBF16, "BF16", 1, 2, decode_bf16}};
    for_each_format([&]<class F>() {
      found.push_back({F::type, F::name, F::block, F::bytes, decode_blocks<F>});
    });
    found.insert(found.end(), std::begin(kSizesAlone), std::end(kSizesAlone));
    return found;
  }();
  return formats;
}

const BlockFormat* find_format(uint32_t type) {
  for (const auto& format : all_formats())
    if (format.type == type) return &format;
  return nullptr;
}

void dequantize(const BlockFormat& format, const uint8_t* src, uint64_t n, float* dst,
                int n_threads) {
  parallel_ranges(n / format.block_size, n_threads, [&](size_t begin, size_t end, int) {
    format.decode(src + begin * format.block_bytes, end - begin, dst + begin * format.block_size);
  });
}

}  // namespace fallow
