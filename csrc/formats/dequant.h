// ggml's quantised block formats, turned into float. Portable C++; compared block by block with the
// gguf package's numpy implementation in the tests.
#pragma once

#include <cstdint>
#include <vector>

namespace fallow {

struct BlockFormat {
  uint32_t type;         // ggml type id
  const char* name;      // as in the gguf package: "Q4_K"
  uint32_t block_size;   // weights per block
  uint32_t block_bytes;
  // Decodes n_blocks blocks; null where only the size is known here.
  void (*decode)(const uint8_t* blocks, uint64_t n_blocks, float* out);
};

// Null if the type is unknown.
const BlockFormat* find_format(uint32_t type);
const std::vector<BlockFormat>& all_formats();

// Decodes n weights, n a multiple of the block size, on n_threads threads.
void dequantize(const BlockFormat& format, const uint8_t* src, uint64_t n, float* dst,
                int n_threads);

}  // namespace fallow
