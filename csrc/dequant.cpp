#include "dequant.h"

#include <bit>
#include <cstring>

#include "parallel.h"

namespace fallow {
namespace {

uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

uint32_t load_u32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// IEEE half to float, subnormals, infinities and NaN included.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1F;
  const uint32_t mantissa = half & 0x3FF;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = exponent == 31 ? sign | 0x7F800000 | mantissa << 13
                                       : sign | (exponent + 112) << 23 | mantissa << 13;
  return std::bit_cast<float>(bits);
}

float load_f16(const uint8_t* p) { return half_to_float(load_u16(p)); }

void decode_f32(const uint8_t* b, uint64_t n, float* y) { std::memcpy(y, b, n * 4); }

void decode_f16(const uint8_t* b, uint64_t n, float* y) {
  for (uint64_t i = 0; i < n; ++i) y[i] = load_f16(b + 2 * i);
}

void decode_bf16(const uint8_t* b, uint64_t n, float* y) {
  for (uint64_t i = 0; i < n; ++i)
    y[i] = std::bit_cast<float>(static_cast<uint32_t>(load_u16(b + 2 * i)) << 16);
}

// d (f16), 32 nibbles: the low ones are weights 0..15, the high ones 16..31.
void decode_q4_0(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 18, y += 32) {
    const float d = load_f16(b);
    for (int j = 0; j < 16; ++j) {
      y[j] = d * ((b[2 + j] & 15) - 8);
      y[j + 16] = d * ((b[2 + j] >> 4) - 8);
    }
  }
}

// d, minimum (f16), 32 nibbles.
void decode_q4_1(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 20, y += 32) {
    const float d = load_f16(b), m = load_f16(b + 2);
    for (int j = 0; j < 16; ++j) {
      y[j] = d * (b[4 + j] & 15) + m;
      y[j + 16] = d * (b[4 + j] >> 4) + m;
    }
  }
}

// d (f16), the 32 fifth bits, 32 nibbles.
void decode_q5_0(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 22, y += 32) {
    const float d = load_f16(b);
    const uint32_t high = load_u32(b + 2);
    for (int j = 0; j < 16; ++j) {
      const int low = (b[6 + j] & 15) | static_cast<int>(high >> j & 1) << 4;
      const int top = (b[6 + j] >> 4) | static_cast<int>(high >> (j + 16) & 1) << 4;
      y[j] = d * (low - 16);
      y[j + 16] = d * (top - 16);
    }
  }
}

// d, minimum (f16), the 32 fifth bits, 32 nibbles.
void decode_q5_1(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 24, y += 32) {
    const float d = load_f16(b), m = load_f16(b + 2);
    const uint32_t high = load_u32(b + 4);
    for (int j = 0; j < 16; ++j) {
      const int low = (b[8 + j] & 15) | static_cast<int>(high >> j & 1) << 4;
      const int top = (b[8 + j] >> 4) | static_cast<int>(high >> (j + 16) & 1) << 4;
      y[j] = d * low + m;
      y[j + 16] = d * top + m;
    }
  }
}

void decode_q8_0(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 34, y += 32) {
    const float d = load_f16(b);
    for (int j = 0; j < 32; ++j) y[j] = d * static_cast<int8_t>(b[2 + j]);
  }
}

// 16 groups of 16: scales[16] (low nibble scale, high nibble minimum), qs[64], d, dmin.
void decode_q2_k(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 84) {
    const float d = load_f16(b + 80), dmin = load_f16(b + 82);
    const uint8_t* scales = b;
    const uint8_t* q = b + 16;
    for (int half = 0; half < 2; ++half, q += 32) {
      for (int shift = 0; shift < 8; shift += 2) {
        for (int part = 0; part < 2; ++part, ++scales, y += 16) {
          const float scale = d * (*scales & 15), minimum = dmin * (*scales >> 4);
          for (int l = 0; l < 16; ++l) y[l] = scale * (q[16 * part + l] >> shift & 3) - minimum;
        }
      }
    }
  }
}

// hmask[32], qs[64], 16 six-bit scales in 12 bytes, d.
void decode_q3_k(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 110) {
    const uint8_t *hmask = b, *q = b + 32, *packed = b + 96;
    const float d = load_f16(b + 108);
    int scales[16];
    for (int i = 0; i < 16; ++i) {
      const int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
      scales[i] = (low | (packed[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32;
    }
    int group = 0;
    uint8_t bit = 1;
    for (int half = 0; half < 2; ++half, q += 32) {
      for (int shift = 0; shift < 8; shift += 2, bit = static_cast<uint8_t>(bit << 1)) {
        for (int part = 0; part < 2; ++part, y += 16) {
          const float scale = d * scales[group++];
          for (int l = 0; l < 16; ++l) {
            const int i = 16 * part + l;
            y[l] = scale * ((q[i] >> shift & 3) - (hmask[i] & bit ? 0 : 4));
          }
        }
      }
    }
  }
}

// Scale and minimum j (of 8, six bits each) from the 12 packed bytes of Q4_K and Q5_K.
void unpack_scale_min(int j, const uint8_t* p, int* scale, int* minimum) {
  if (j < 4) {
    *scale = p[j] & 63;
    *minimum = p[j + 4] & 63;
  } else {
    *scale = (p[j + 4] & 15) | (p[j - 4] >> 6) << 4;
    *minimum = (p[j + 4] >> 4) | (p[j] >> 6) << 4;
  }
}

// d, dmin, 12 bytes of scales, 256 nibbles in four runs of 64.
void decode_q4_k(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 144) {
    const float d = load_f16(b), dmin = load_f16(b + 2);
    const uint8_t* q = b + 16;
    for (int j = 0; j < 8; j += 2, q += 32, y += 64) {
      int s0, m0, s1, m1;
      unpack_scale_min(j, b + 4, &s0, &m0);
      unpack_scale_min(j + 1, b + 4, &s1, &m1);
      for (int l = 0; l < 32; ++l) {
        y[l] = d * s0 * (q[l] & 15) - dmin * m0;
        y[l + 32] = d * s1 * (q[l] >> 4) - dmin * m1;
      }
    }
  }
}

// As Q4_K, with 32 bytes of fifth bits before the nibbles.
void decode_q5_k(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 176) {
    const float d = load_f16(b), dmin = load_f16(b + 2);
    const uint8_t *high = b + 16, *q = b + 48;
    for (int j = 0; j < 8; j += 2, q += 32, y += 64) {
      int s0, m0, s1, m1;
      unpack_scale_min(j, b + 4, &s0, &m0);
      unpack_scale_min(j + 1, b + 4, &s1, &m1);
      for (int l = 0; l < 32; ++l) {
        y[l] = d * s0 * ((q[l] & 15) | (high[l] >> j & 1) << 4) - dmin * m0;
        y[l + 32] = d * s1 * ((q[l] >> 4) | (high[l] >> (j + 1) & 1) << 4) - dmin * m1;
      }
    }
  }
}

// 256 low nibbles, 256 two-bit tops, 16 int8 scales, d.
void decode_q6_k(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += 210) {
    const uint8_t *low = b, *high = b + 128;
    const auto* scales = reinterpret_cast<const int8_t*>(b + 192);
    const float d = load_f16(b + 208);
    for (int half = 0; half < 2; ++half, low += 64, high += 32, scales += 8, y += 128) {
      for (int l = 0; l < 32; ++l) {
        const int g = l / 16;
        y[l] = d * scales[g] * (((low[l] & 15) | (high[l] & 3) << 4) - 32);
        y[l + 32] = d * scales[g + 2] * (((low[l + 32] & 15) | (high[l] >> 2 & 3) << 4) - 32);
        y[l + 64] = d * scales[g + 4] * (((low[l] >> 4) | (high[l] >> 4 & 3) << 4) - 32);
        y[l + 96] = d * scales[g + 6] * (((low[l + 32] >> 4) | (high[l] >> 6) << 4) - 32);
      }
    }
  }
}

constexpr BlockFormat kFormats[] = {
    {0, "F32", 1, 4, decode_f32},        {1, "F16", 1, 2, decode_f16},
    {2, "Q4_0", 32, 18, decode_q4_0},    {3, "Q4_1", 32, 20, decode_q4_1},
    {6, "Q5_0", 32, 22, decode_q5_0},    {7, "Q5_1", 32, 24, decode_q5_1},
    {8, "Q8_0", 32, 34, decode_q8_0},    {10, "Q2_K", 256, 84, decode_q2_k},
    {11, "Q3_K", 256, 110, decode_q3_k}, {12, "Q4_K", 256, 144, decode_q4_k},
    {13, "Q5_K", 256, 176, decode_q5_k}, {14, "Q6_K", 256, 210, decode_q6_k},
    {30, "BF16", 1, 2, decode_bf16},
    // Sizes alone, so that a file which has them can be listed; decoded by the gguf package.
    {16, "IQ2_XXS", 256, 66, nullptr},   {17, "IQ2_XS", 256, 74, nullptr},
    {18, "IQ3_XXS", 256, 98, nullptr},   {19, "IQ1_S", 256, 50, nullptr},
    {20, "IQ4_NL", 32, 18, nullptr},     {21, "IQ3_S", 256, 110, nullptr},
    {22, "IQ2_S", 256, 82, nullptr},     {23, "IQ4_XS", 256, 136, nullptr},
    {29, "IQ1_M", 256, 56, nullptr},     {34, "TQ1_0", 256, 54, nullptr},
    {35, "TQ2_0", 256, 66, nullptr},
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
