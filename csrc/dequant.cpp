#include "dequant.h"

#include <cstring>

#include "formats.h"
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

template <class F>
constexpr BlockFormat blocks(const char* name) {
  return {F::type, name, F::block, F::bytes, decode_blocks<F>};
}

constexpr BlockFormat kFormats[] = {
    {kF32, "F32", 1, 4, decode_f32}, {kF16, "F16", 1, 2, decode_f16},
    {kBF16, "BF16", 1, 2, decode_bf16}, blocks<Q4_0>("Q4_0"), blocks<Q4_1>("Q4_1"),
    blocks<Q5_0>("Q5_0"), blocks<Q5_1>("Q5_1"), blocks<Q8_0>("Q8_0"), blocks<Q2_K>("Q2_K"),
    blocks<Q3_K>("Q3_K"), blocks<Q4_K>("Q4_K"), blocks<Q5_K>("Q5_K"), blocks<Q6_K>("Q6_K"),
    // Sizes alone, so that a file which has them can be listed; decoded by the gguf package.
    {16, "IQ2_XXS", 256, 66, nullptr},   {17, "IQ2_XS", 256, 74, nullptr},
    {18, "IQ3_XXS", 256, 98, nullptr},   {19, "IQ1_S", 256, 50, nullptr},
    {20, "IQ4_NL", 32, 18, nullptr},     {21, "IQ3_S", 256, 110, nullptr},
    {22, "IQ2_S", 256, 82, nullptr},     {23, "IQ4_XS", 256, 136, nullptr},
    {29, "IQ1_M", 256, 56, nullptr},     {34, "TQ1_0", 256, 54, nullptr},
    {35, "TQ2_0", 256, 66, nullptr},     {24, "I8", 1, 1, nullptr},
};

}  // namespace

std::span<const BlockFormat> all_formats() { return kFormats; }

const BlockFormat* find_format(uint32_t type) {
  for (const auto& format : kFormats)
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
