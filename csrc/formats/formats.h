// ggml's block formats. Each unpacks a block into unsigned integers q with one scale s (and, where
// it has minima, one m) for every `group` weights:
//
//     w_i = s[i / group] * (q_i - offset) - m[i / group]
//
// `centre` is the middle of q's range: q_i - centre is signed and small. A format is a struct here; what
// lists formats, in C++ and in Python, is made from the list at the end.
// Everything else (decoding, products, sparse sums, prefill panels) is built on that.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace fallow {

// ggml type ids.
enum GgmlType : uint32_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ5_0 = 6, kQ5_1 = 7, kQ8_0 = 8, kQ2_K = 10,
  kQ3_K = 11, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kIQ4_NL = 20, kIQ4_XS = 23, kBF16 = 30, kMXFP4 = 39,
  kGgmlTypes = 40,
  kTwoBits = kGgmlTypes,  // ours (two_bits.h)
  kTypes,
};

static inline uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

static inline uint32_t load_u32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// IEEE half to float, subnormals, infinities and NaN included.
static inline float half_to_float(uint16_t half) {
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

// Float to the nearest IEEE half, ties to even.
static inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);  // NaN
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal half: let the addition round
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

static inline float load_f16(const uint8_t* p) { return half_to_float(load_u16(p)); }
static inline float load_bf16(const uint8_t* p) {
  return std::bit_cast<float>(static_cast<uint32_t>(load_u16(p)) << 16);
}

// 32 nibbles in 16 bytes: the low ones are weights 0..15, the high ones 16..31.
static inline void unpack_nibbles(const uint8_t* b, uint8_t* q) {
  for (int j = 0; j < 16; ++j) {
    q[j] = b[j] & 15;
    q[j + 16] = b[j] >> 4;
  }
}

static inline void add_fifth_bits(uint32_t bits, uint8_t* q) {
  for (int j = 0; j < 32; ++j) q[j] = static_cast<uint8_t>(q[j] | (bits >> j & 1) << 4);
}

// d (f16), 32 nibbles.
struct Q4_0 {
  static constexpr const char* name = "Q4_0";
  static constexpr uint32_t type = kQ4_0, block = 32, bytes = 18, group = 32, offset = 8, centre = 8;
  static constexpr bool has_min = false;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    s[0] = load_f16(b);
    unpack_nibbles(b + 2, q);
  }
};

// d, minimum (f16), 32 nibbles.
struct Q4_1 {
  static constexpr const char* name = "Q4_1";
  static constexpr uint32_t type = kQ4_1, block = 32, bytes = 20, group = 32, offset = 0, centre = 8;
  static constexpr bool has_min = true;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float* m) {
    s[0] = load_f16(b);
    m[0] = -load_f16(b + 2);
    unpack_nibbles(b + 4, q);
  }
};

// d (f16), the 32 fifth bits, 32 nibbles.
struct Q5_0 {
  static constexpr const char* name = "Q5_0";
  static constexpr uint32_t type = kQ5_0, block = 32, bytes = 22, group = 32, offset = 16, centre = 16;
  static constexpr bool has_min = false;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    s[0] = load_f16(b);
    unpack_nibbles(b + 6, q);
    add_fifth_bits(load_u32(b + 2), q);
  }
};

// d, minimum (f16), the 32 fifth bits, 32 nibbles.
struct Q5_1 {
  static constexpr const char* name = "Q5_1";
  static constexpr uint32_t type = kQ5_1, block = 32, bytes = 24, group = 32, offset = 0, centre = 16;
  static constexpr bool has_min = true;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float* m) {
    s[0] = load_f16(b);
    m[0] = -load_f16(b + 2);
    unpack_nibbles(b + 8, q);
    add_fifth_bits(load_u32(b + 4), q);
  }
};

// d (f16), 32 int8, here offset by 128.
struct Q8_0 {
  static constexpr const char* name = "Q8_0";
  static constexpr uint32_t type = kQ8_0, block = 32, bytes = 34, group = 32, offset = 128, centre = 128;
  static constexpr bool has_min = false;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    s[0] = load_f16(b);
    for (int j = 0; j < 32; ++j) q[j] = b[2 + j] ^ 128;
  }
};

// 16 groups of 16: scales[16] (low nibble scale, high nibble minimum), qs[64], d, dmin.
struct Q2_K {
  static constexpr const char* name = "Q2_K";
  static constexpr uint32_t type = kQ2_K, block = 256, bytes = 84, group = 16, offset = 0, centre = 2;
  static constexpr bool has_min = true;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float* m) {
    const float d = load_f16(b + 80), dmin = load_f16(b + 82);
    for (int g = 0; g < 16; ++g) {
      s[g] = d * (b[g] & 15);
      m[g] = dmin * (b[g] >> 4);
    }
    const uint8_t* packed = b + 16;
    for (int half = 0; half < 2; ++half, packed += 32)
      for (int shift = 0; shift < 8; shift += 2, q += 32)
        for (int l = 0; l < 32; ++l) q[l] = packed[l] >> shift & 3;
  }
};

// hmask[32], qs[64], 16 six-bit scales in 12 bytes, d.
struct Q3_K {
  static constexpr const char* name = "Q3_K";
  static constexpr uint32_t type = kQ3_K, block = 256, bytes = 110, group = 16, offset = 4, centre = 4;
  static constexpr bool has_min = false;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    const uint8_t *high = b, *low = b + 32, *packed = b + 96;
    const float d = load_f16(b + 108);
    for (int i = 0; i < 16; ++i) {
      const int nibble = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
      s[i] = d * ((nibble | (packed[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) - 32);
    }
    for (int part = 0; part < 8; ++part, q += 32)
      for (int l = 0; l < 32; ++l)
        q[l] = static_cast<uint8_t>((low[32 * (part / 4) + l] >> (2 * (part % 4)) & 3) |
                                    (high[l] >> part & 1) << 2);
  }
};

// The 8 scales and 8 minima (six bits each) in the 12 packed bytes of Q4_K and Q5_K.
static inline void unpack_scales_minima(const uint8_t* b, float* s, float* m) {
  const float d = load_f16(b), dmin = load_f16(b + 2);
  const uint8_t* p = b + 4;
  for (int j = 0; j < 4; ++j) {
    s[j] = d * (p[j] & 63);
    m[j] = dmin * (p[j + 4] & 63);
    s[j + 4] = d * ((p[j + 8] & 15) | (p[j] >> 6) << 4);
    m[j + 4] = dmin * ((p[j + 8] >> 4) | (p[j + 4] >> 6) << 4);
  }
}

// d, dmin, 12 bytes of scales, 256 nibbles in four runs of 64.
struct Q4_K {
  static constexpr const char* name = "Q4_K";
  static constexpr uint32_t type = kQ4_K, block = 256, bytes = 144, group = 32, offset = 0, centre = 8;
  static constexpr bool has_min = true;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float* m) {
    unpack_scales_minima(b, s, m);
    const uint8_t* packed = b + 16;
    for (int j = 0; j < 4; ++j, packed += 32, q += 64)
      for (int l = 0; l < 32; ++l) {
        q[l] = packed[l] & 15;
        q[l + 32] = packed[l] >> 4;
      }
  }
};

// As Q4_K, with 32 bytes of fifth bits before the nibbles.
struct Q5_K {
  static constexpr const char* name = "Q5_K";
  static constexpr uint32_t type = kQ5_K, block = 256, bytes = 176, group = 32, offset = 0, centre = 16;
  static constexpr bool has_min = true;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float* m) {
    unpack_scales_minima(b, s, m);
    const uint8_t *high = b + 16, *packed = b + 48;
    for (int j = 0; j < 8; j += 2, packed += 32, q += 64)
      for (int l = 0; l < 32; ++l) {
        q[l] = static_cast<uint8_t>((packed[l] & 15) | (high[l] >> j & 1) << 4);
        q[l + 32] = static_cast<uint8_t>((packed[l] >> 4) | (high[l] >> (j + 1) & 1) << 4);
      }
  }
};

// 256 low nibbles, 256 two-bit tops, 16 int8 scales, d.
struct Q6_K {
  static constexpr const char* name = "Q6_K";
  static constexpr uint32_t type = kQ6_K, block = 256, bytes = 210, group = 16, offset = 32, centre = 32;
  static constexpr bool has_min = false;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    const uint8_t *low = b, *high = b + 128;
    const float d = load_f16(b + 208);
    for (int g = 0; g < 16; ++g) s[g] = d * static_cast<int8_t>(b[192 + g]);
    for (int half = 0; half < 2; ++half, low += 64, high += 32, q += 128)
      for (int l = 0; l < 32; ++l) {
        q[l] = static_cast<uint8_t>((low[l] & 15) | (high[l] & 3) << 4);
        q[l + 32] = static_cast<uint8_t>((low[l + 32] & 15) | (high[l] >> 2 & 3) << 4);
        q[l + 64] = static_cast<uint8_t>((low[l] >> 4) | (high[l] >> 4 & 3) << 4);
        q[l + 96] = static_cast<uint8_t>((low[l + 32] >> 4) | (high[l] >> 6) << 4);
      }
  }
};

// What four bits stand for.
constexpr int8_t kIQ4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// Twice the numbers of four bits with two of exponent (E2M1).
constexpr int8_t kMXFP4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static inline void look_up(const int8_t* values, uint8_t* q, int n) {
  for (int j = 0; j < n; ++j) q[j] = static_cast<uint8_t>(values[q[j]] + 128);
}

// d (f16), 32 nibbles.
struct IQ4_NL {
  static constexpr const char* name = "IQ4_NL";
  static constexpr uint32_t type = kIQ4_NL, block = 32, bytes = 18, group = 32, offset = 128, centre = 128;
  static constexpr bool has_min = false;
  static constexpr const int8_t* values = kIQ4Values;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    s[0] = load_f16(b);
    unpack_nibbles(b + 2, q);
    look_up(values, q, 32);
  }
};

// d (f16), the upper two bits of 8 scales, their lower four in 4 bytes, 32 nibbles for each scale.
struct IQ4_XS {
  static constexpr const char* name = "IQ4_XS";
  static constexpr uint32_t type = kIQ4_XS, block = 256, bytes = 136, group = 32, offset = 128, centre = 128;
  static constexpr bool has_min = false;
  static constexpr const int8_t* values = kIQ4Values;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    const float d = load_f16(b);
    const uint32_t high = load_u16(b + 2), low = load_u32(b + 4);
    for (int g = 0; g < 8; ++g, q += 32) {
      const uint32_t scale = (low >> 4 * g & 15) | (high >> 2 * g & 3) << 4;
      s[g] = d * static_cast<float>(static_cast<int>(scale) - 32);
      unpack_nibbles(b + 8 + 16 * g, q);
      look_up(values, q, 32);
    }
  }
};

// 2^(e - 128), for values that are doubled.
static inline float half_power(uint32_t e) {
  return std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
}

// The exponent of a power of two, 32 nibbles.
struct MXFP4 {
  static constexpr const char* name = "MXFP4";
  static constexpr uint32_t type = kMXFP4, block = 32, bytes = 17, group = 32, offset = 128, centre = 128;
  static constexpr bool has_min = false;
  static constexpr const int8_t* values = kMXFP4Values;
  static void unpack(const uint8_t* b, uint8_t* q, float* s, float*) {
    s[0] = half_power(b[0]);
    unpack_nibbles(b + 1, q);
    look_up(values, q, 32);
  }
};

// Calls use.operator()<F>() for every format above.
template <class Use>
static inline void for_each_format(const Use& use) {
  const auto all = [&]<class... F>() { (use.template operator()<F>(), ...); };
  all.template operator()<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4>();
}

// Decodes n blocks; gguf.dequantize gives the same bits.
template <class F>
static void decode_blocks(const uint8_t* b, uint64_t n, float* y) {
  for (; n; --n, b += F::bytes, y += F::block) {
    uint8_t q[F::block];
    float s[F::block / F::group], m[F::block / F::group];
    F::unpack(b, q, s, m);
    for (uint32_t g = 0; g < F::block / F::group; ++g)
      for (uint32_t i = g * F::group; i < (g + 1) * F::group; ++i) {
        const float w = s[g] * static_cast<float>(static_cast<int>(q[i]) - static_cast<int>(F::offset));
        y[i] = F::has_min ? w - m[g] : w;
      }
  }
}

}  // namespace fallow
