// What a few-token kernel is compiled for, and the sizes that follow from it. No device code.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::skinny {

// Warps of a CTA, and stages of each warp's ring: how much of W is on its way, and how many warps
// wait for x meanwhile. 8 warps instead of 16 take a tenth longer at 8 tokens; at 64 tokens the
// registers of 16 do not suffice, and the fewer the stages, the more is left to cache x.
struct Config {
  int warps;
  int stages;
};
constexpr Config config_for(int tokens) {
  return tokens <= 32 ? Config{.warps = 16, .stages = 3} : Config{.warps = 8, .stages = 3};
}

// Of a ring's stage: units of 512 bytes go through it four at a time, so that the loop costs less.
constexpr int kStageBytes = 2048;

// Shared memory of a CTA: the rings, and sums of each warp.
constexpr int shared_bytes(int unit_outputs, int tokens) {
  const Config config = config_for(tokens);
  constexpr int kRest = 128;
  return config.warps * (config.stages * kStageBytes + unit_outputs * tokens * 4) + kRest;
}

// A warp multiplies units: kOutputs outputs by kDepth inputs of a block, for all tokens at once.
// Transposed (grad_input), the outputs of the product are the inputs of the block. Values are of
// the type of the rest, or int8 with a scale for each output.
template <class Element, class StoredValue, bool kTransposedBlock, int kUnitOutputs, int kUnitDepth,
          int kMaxTokens>
struct Choice {
  using T = Element;
  using Value = StoredValue;
  static constexpr bool kScaled = !std::is_same_v<T, Value>;
  static constexpr bool kTransposed = kTransposedBlock;
  static constexpr int kOutputs = kUnitOutputs;
  static constexpr int kDepth = kUnitDepth;
  static constexpr int kTokens = kMaxTokens;

  // A stage is as many units for int8, which are smaller: so there is room for more stages.
  static constexpr int kValuesOfElement = static_cast<int>(sizeof(T) / sizeof(Value));
  static constexpr int kUnitBytes = kOutputs * kDepth * static_cast<int>(sizeof(Value));
  static constexpr int kUnits = kStageBytes / kUnitBytes / kValuesOfElement;  // of a stage
  static constexpr int kWarps = config_for(kTokens).warps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = config_for(kTokens).stages * kValuesOfElement;
  static_assert(kStages * kUnits <= 32, "no further than Places looks ahead");
  static_assert(!kScaled || !kTransposed, "int8 values are read in forward only");

  // Whether it starts while the kernel before it still runs, whosever that is: where it was
  // measured.
  static constexpr bool kEarly = Traits<T>::dtype == Dtype::bf16 && !kScaled;

  // Sums of a warp: four of each lane for every 16 outputs x 8 tokens.
  static constexpr int kHigh = kOutputs / 16;
  static constexpr int kWide = kTokens / 8;
  static constexpr int kSums = kHigh * kWide * 32;  // float4s
};

}  // namespace block_sparse::cuda::skinny
