// What libFuzzer gives the core's own parsers, and one pass through what they accept: see scripts/fuzz.sh.
// An input is a packed model or a file of `fallow llama pack`, and kTail bytes, which say what is cut.
#include <cstring>
#include <set>
#include <string>

#include "engine/engine.h"
#include "formats/gguf.h"
#include "kernels/kernels.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace fallow {
namespace {

constexpr size_t kTail = 34, kCuts = 8;

// As a caller of the engine may: a cut of a tap that the model has, with as many weights as it is wide.
std::vector<LayerCuts> cuts_of(const Packed& model, const uint8_t* tail) {
  const Config& c = model.config;
  std::vector<LayerCuts> cuts(c.n_layers);
  for (size_t i = 0; i < kCuts; ++i, tail += 4) {
    const auto tap = static_cast<Tap>(tail[1] % kTaps);
    const bool of_neurons = tap >= kGatePre && tap <= kInter;
    const bool of_ffn = tap >= kGateInput && tap <= kFfnOut;
    if (c.n_experts > 0 ? of_ffn && !of_neurons : tap == kRouter) continue;
    const size_t layer = tail[0] % c.n_layers;
    Cut& cut = cuts[layer][tap];
    cut.by = static_cast<Cut::By>(tail[2] % (kLastBy + 1));
    cut.value = (tail[3] & 127) / 127.0;
    if (tail[3] < 128) continue;
    cut.weight.assign(model.width_of(layer, tap), 0.5f);
  }
  return cuts;
}

void pass(const uint8_t* data, size_t size, const uint8_t* tail) {
  const Packed model = read_packed(data, size);
  const uint32_t vocab = model.config.vocab_size;
  const uint32_t context = std::min(4u, model.config.context_length);
  const uint8_t how = tail[4 * kCuts];
  const auto kernels = usable_kernels();
  Engine engine(model, *kernels[how % kernels.size()], 1, context, 8);
  engine.set_skips_zeros(how & 64);
  if (how & 128) engine.set_cuts(cuts_of(model, tail));
  if (model.lm_head_coarse.data) engine.set_shortlist(static_cast<float>(how & 3), 8);
  const int32_t ids[] = {0, static_cast<int32_t>(tail[4 * kCuts + 1] % vocab), static_cast<int32_t>(vocab - 1), 0};
  std::vector<float> logits(size_t{context} * vocab);
  engine.forward(ids, context, 0, true, false, how & 32, true, logits.data());
  engine.forward(ids, 1, context - 1, false, false, false, false, logits.data());
}

// Where the tensors begin; 0 of what is no GGUF.
size_t header_bytes(const uint8_t* data, size_t size) {
  try {
    uint64_t first = size;
    for (const auto& tensor : parse_gguf(data, size).tensors) first = std::min(first, tensor.offset);
    return first;
  } catch (const GgufError&) {
    return 0;
  }
}

}  // namespace
}  // namespace fallow

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fallow;
  if (size < kTail) return 0;
  const uint8_t* tail = data + size - kTail;
  try {
    pass(data, size - kTail, tail);
  } catch (const PackedError&) {
  } catch (const GgufError&) {
  }
  try {
    (void)read_ffn_file(data, size - kTail);
  } catch (const PackedError&) {
  } catch (const GgufError&) {
  }
  return 0;
}

// Seven of eight changes are of the header, which is far smaller than the weights, and as many of the rest
// of what is cut.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  using namespace fallow;
  if (size < kTail || seed % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
  if (seed % 8 == 1) {
    LLVMFuzzerMutate(data + size - kTail, kTail, kTail);
    return size;
  }
  const size_t header = header_bytes(data, size - kTail);
  if (header == 0) return LLVMFuzzerMutate(data, size, max_size);
  const std::vector<uint8_t> rest(data + header, data + size);
  const size_t changed = LLVMFuzzerMutate(data, header, std::min(max_size - rest.size(), header + 64));
  std::memcpy(data + changed, rest.data(), rest.size());
  return changed + rest.size();
}
