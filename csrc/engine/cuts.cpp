#include "engine/cuts.h"

#include <algorithm>
#include <cmath>

namespace fallow {

Cuts::Cuts(Runtime& run, size_t width) : run_(run), scratch_(run.n_threads()) {
  for (Scratch& own : scratch_) {
    own.selector = RowSelector(width);
    own.scores.resize(width);
  }
}

const Cut& Cuts::at(size_t layer, Tap tap) const {
  static const Cut kNone, kZeros{Cut::By::kThreshold, 0, {}};
  if (is_dense() || tap == kTaps) return kNone;
  if (!layers_.empty() && layers_[layer][tap].cuts()) return layers_[layer][tap];
  const bool skips = (skips_zeros_ && tap == kGateAct) || (skips_up_zeros_ && tap == kInter);
  return skips ? kZeros : kNone;
}

bool Cuts::any(size_t layer, std::initializer_list<Tap> taps) const {
  return std::any_of(taps.begin(), taps.end(), [&](Tap tap) { return at(layer, tap).cuts(); });
}

void Cuts::apply(const Cut& cut, float* values, size_t width, int worker, size_t first) {
  if (!cut.cuts()) return;
  Scratch& own = scratch_[static_cast<size_t>(worker)];
  float* score = own.scores.data();
  if (cut.weight.empty()) {
    for (size_t i = 0; i < width; ++i) score[i] = std::fabs(values[i]);
  } else {
    const float* weight = cut.weight.data() + first;
    for (size_t i = 0; i < width; ++i) score[i] = std::fabs(values[i]) * weight[i];
  }
  float threshold = static_cast<float>(cut.value);
  if (cut.by == Cut::By::kTopk)
    threshold = run_.kernels.topk_threshold(
        score, width, static_cast<size_t>(std::nearbyint(cut.value * static_cast<double>(width))));
  if (cut.by == Cut::By::kTail)
    threshold = own.selector.tail(score, width, cut.value * cut.value, Mass::kSquare);
  if (cut.by == Cut::By::kMass) threshold = own.selector.tail(score, width, cut.value, Mass::kScore);
  for (size_t i = 0; i < width; ++i) values[i] = score[i] <= threshold ? 0.0f : values[i];
}

size_t Cuts::keep_active(const Cut& cut, float* values, Share range, int32_t* active, size_t first) const {
  const auto threshold = static_cast<float>(cut.value);
  if (cut.weight.empty()) {
    for (size_t i = range.begin; i < range.end; ++i)
      values[i] = std::fabs(values[i]) <= threshold ? 0.0f : values[i];
  } else {
    const float* weight = cut.weight.data() + first;
    for (size_t i = range.begin; i < range.end; ++i)
      values[i] = std::fabs(values[i]) * weight[i] <= threshold ? 0.0f : values[i];
  }
  return run_.kernels.list_nonzero(values, range.begin, range.end, active);
}

}  // namespace fallow
