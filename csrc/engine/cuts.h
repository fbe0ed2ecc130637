// What a plan leaves out: values of a layer and token that become zero. docs/plan.md defines it.
#pragma once

#include <array>
#include <initializer_list>
#include <vector>

#include "engine/runtime.h"
#include "stats/select.h"

namespace fallow {

// Places where a plan may set values to zero, in the order of the computation: inputs of projections
// and values of the FFN. Of a mixture of experts, the square roots of a token's shares of its experts.
enum Tap {
  kQInput, kKInput, kVInput, kOInput, kGateInput, kUpInput,
  kGatePre, kGateAct, kUp, kInter, kDownInput, kFfnOut, kRouter, kTaps,
};

// Values v_i of one layer and token with |v_i| * weight_i <= threshold are inactive and become zero.
// The threshold is fixed, or that of the k largest scores, or that of a tail of tau^2 of the squared
// scores, or of a share of the scores themselves.
struct Cut {
  enum class By { kNothing, kThreshold, kTopk, kTail, kMass };
  By by = By::kNothing;
  double value = 0;           // the threshold, k as a share of the width, tau, or the share
  std::vector<float> weight;  // empty: all ones; of a mixture's neurons those of all experts

  bool cuts() const { return by != By::kNothing; }
  // Whether one value is enough to know that it is inactive.
  bool is_fixed() const { return by == By::kNothing || by == By::kThreshold; }
};

constexpr uint32_t kLastBy = static_cast<uint32_t>(Cut::By::kMass);  // what files and callers may say

using LayerCuts = std::array<Cut, kTaps>;

// Neurons that a thread works on: listed, ascending, or `begin` and those that follow it.
struct Neurons {
  const int32_t* list;
  size_t begin, n;

  size_t at(size_t i) const { return list ? static_cast<size_t>(list[i]) : begin + i; }
};

class Cuts {
 public:
  // `width`: of the widest tap.
  Cuts(Runtime& run, size_t width);

  // Empty: dense. Otherwise one entry per layer.
  void set(std::vector<LayerCuts> layers) { layers_ = std::move(layers); }
  // Whether neurons that the activation makes exactly zero are left out, with any plan and without; and
  // those that a ReLU of `up` does.
  void set_skips_zeros(bool of_gate, bool of_up) { skips_zeros_ = of_gate, skips_up_zeros_ = of_up; }
  // Whether this pass leaves the plan aside.
  void leave_aside(bool aside) { aside_ = aside; }

  bool skips_zeros() const { return skips_zeros_ && !aside_; }
  bool is_dense() const { return aside_ || (layers_.empty() && !skips_zeros_); }
  const Cut& at(size_t layer, Tap tap) const;
  bool any(size_t layer, std::initializer_list<Tap> taps) const;
  // Whether the FFN's rows are then read one by one.
  bool leaves_out_neurons(size_t layer) const {
    return any(layer, {kGateInput, kUpInput, kGatePre, kGateAct, kUp, kInter, kDownInput});
  }

  // Whether neurons are chosen by their gates, before up_proj is read.
  bool chooses_by_gate(size_t layer) const { return any(layer, {kGatePre, kGateAct}); }

  // Sets inactive ones of a token's values (width,) to zero. Their weights begin at the cut's `first`.
  void apply(const Cut& cut, float* values, size_t width, int worker, size_t first = 0);
  // The same by a fixed threshold for a range of values; lists the others' indices and returns how many.
  size_t keep_active(const Cut& cut, float* values, Share range, int32_t* active, size_t first = 0) const;

 private:
  struct Scratch {
    RowSelector selector;
    std::vector<float> scores;
  };

  Runtime& run_;
  std::vector<LayerCuts> layers_;
  bool aside_ = false, skips_zeros_ = false, skips_up_zeros_ = false;
  std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace fallow
