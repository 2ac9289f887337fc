// What a few-token kernel is compiled for, and the sizes that follow from it. No device code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::skinny {

// Warps of a CTA, and how many CTAs a multiprocessor has room for: with two, that of the next product
// is there before this one has ended, and asks for W (kernel.cuh).
struct Config {
  int warps;
  int ctas;

  // That registers are kept for: with two CTAs some are left for the small kernels, which run beside
  // them.
  constexpr int bound_threads() const { return 32 * (ctas == 1 ? warps : warps + 2); }
};
#ifdef SKINNY_WARPS
constexpr Config config_for(int) { return Config{SKINNY_WARPS, SKINNY_WARPS == 16 ? 1 : 2}; }
#else
constexpr Config config_for(int tokens) { return tokens <= 32 ? Config{8, 2} : Config{16, 1}; }
#endif
// Parts that the tokens of a unit are split into, each of them a warp's: with more than 32 there are
// too few registers for 16 warps, and the x of a unit is copied once for both.
constexpr int parts_of(int tokens) { return tokens <= 16 ? 1 : 2; }

// What a warp multiplies at a time: `outputs` by `depth` of a block.
struct UnitSizes {
  int bytes;
  int input_bytes;  // of the x that it meets
  int of_stage;     // units of a ring's stage: small ones several at a time, so that a loop costs less

  constexpr UnitSizes(int outputs, int depth, int tokens, int64_t element, int64_t value)
      : bytes(outputs * depth * static_cast<int>(value)),
        input_bytes(tokens * depth * static_cast<int>(element)),
        of_stage(std::clamp(std::min(2048 / (outputs * depth * static_cast<int>(element)),
                                     6144 / (bytes + input_bytes)),
                            1, 4)) {}
};
constexpr int kMaxStages = 8;

// Whether x is first put into the order of the units (order.cuh): where a row of it is 32 bytes, and
// there are many.
constexpr bool is_ordered(int64_t row_bytes, int tokens) { return row_bytes == 32 && tokens > 16; }

// Shared memory apart from the rings: sums and state of each warp.
constexpr int shared_rest(int outputs, int tokens) {
  constexpr int kState = 128;
  return config_for(tokens).warps * outputs * (tokens / parts_of(tokens)) * 4 + kState;
}

// A warp multiplies units: kOutputs outputs by kDepth inputs of a block, for its part of the tokens.
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
  static constexpr int kParts = parts_of(kTokens);
  static constexpr int kWarpTokens = kTokens / kParts;
  static constexpr int kWarps = config_for(kTokens).warps;
  static constexpr int kThreads = kWarps * 32;
  static_assert(!kScaled || !kTransposed, "int8 values are read in forward only");

  static constexpr UnitSizes kUnit{kOutputs, kDepth, kTokens, sizeof(T), sizeof(Value)};
  static constexpr int kUnitBytes = kUnit.bytes;
  static constexpr int kInputBytes = kUnit.input_bytes;
  static constexpr int kUnits = kUnit.of_stage;
  static constexpr bool kOrdered = is_ordered(kDepth * sizeof(T), kTokens);
  static_assert(kMaxStages * kUnits <= 32, "no further than Places looks ahead");

  // Sums of a warp: four of each lane for every 16 outputs x 8 tokens.
  static constexpr int kHigh = kOutputs / 16;
  static constexpr int kWide = kWarpTokens / 8;
  static constexpr int kSums = kHigh * kWide * 32;  // float4s
};

}  // namespace block_sparse::cuda::skinny
