// Patterns of active neurons as rows of bits, and codebooks of them. A row is `words` words of 64
// bits, a multiple of kLineWords: whole lines of 64 bytes, zero behind the last neuron. Neuron i is bit
// i % 64 of word i / 64, which on little-endian machines is numpy's packbits(bitorder="little").
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace fallow {

constexpr size_t kLineWords = 8;
// Bits of a weight of a neuron, where neurons have weights: a row for each.
constexpr size_t kWeightPlanes = 4;

struct BitRows {
  const uint64_t* data;  // (n, words)
  size_t n, words;

  const uint64_t* row(size_t i) const { return data + i * words; }
};

// For each of `rows` x the `label` c with the largest 2 overlap(x, c) - offset[c], the lowest among
// equals, and that overlap. With `planes` 1 it is the number of bits in both x and row c of
// `codebook`; with kWeightPlanes the sum over p of 2^p times that with row c * planes + p, so that
// neurons count with weights of 4 bits. Doubling lets offsets be those of squared distances.
void nearest(const Kernels& kernels, BitRows rows, BitRows codebook, size_t planes,
             const int32_t* offset, int32_t* labels, int32_t* overlaps, int n_threads);

// counts[i * others.n + j] = bits in both row i of `rows` and row j of `others`.
void overlaps(const Kernels& kernels, BitRows rows, BitRows others, uint32_t* counts,
              int n_threads);

// counts (n_labels, 64 words): adds each row's bits to its label's; rows with labels below 0 are left
// out. The caller checks labels.
void add_rows(BitRows rows, const int32_t* labels, size_t n_labels, uint32_t* counts,
              int n_threads);

}  // namespace fallow
