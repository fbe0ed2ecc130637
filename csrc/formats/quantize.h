// Floats into ggml's K formats, which the gguf package can read but not write.
#pragma once

#include <cstdint>

namespace fallow {

// n values (a multiple of 256) into blocks of Q4_K, Q5_K or Q6_K. False for another type.
bool quantize_k(uint32_t type, const float* x, uint64_t n, uint8_t* out, int n_threads);

}  // namespace fallow
