// Plan: how a few-token product is cut for a GPU. Host code, shared by the launch and by the size
// of the workspace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "block_sparse/product.h"
#include "cuda/dense/choice.h"
#include "cuda/launch.h"
#include "cuda/skinny/choice.h"
#include "cuda/sm90/split.h"

namespace block_sparse::cuda::skinny {

// Tokens are computed in eights, and for every count there is a kernel with room for it.
constexpr int kMaxTokens = 64;
constexpr int padded_tokens(int64_t tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : kMaxTokens;
}

// What of a GPU it depends on.
struct Device {
  int multiprocessors;
  int shared_bytes;                    // of a CTA, at most
  int multiprocessor_shared_bytes;
  int reserved_bytes;                  // of it, for each CTA

  // For each of so many CTAs.
  int shared_bytes_for(int ctas) const {
    return std::min(shared_bytes, multiprocessor_shared_bytes / ctas - reserved_bytes);
  }
};

inline Device this_device() {
  return {multiprocessors(), device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          device_attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
}

struct Plan {
  int64_t block_outputs;
  int64_t block_depth;
  int64_t outputs;
  int64_t depth;
  // Of a unit. 32 where the block allows: x is read once for all outputs of a unit.
  int64_t unit_outputs;
  int64_t unit_depth;
  int64_t strips;
  int64_t units;
  int64_t members;
  int64_t teams;
  int64_t ctas;
  int64_t stages;  // of the rings; less than 2: too little shared memory
  int64_t ring_bytes;
  int64_t shared_bytes;
  int64_t ordered_bytes;  // of x in the order of the units; 0 where it stays as it is

  // float4s, of all parts of rows of one kind.
  int64_t parts(int64_t tokens) const { return ctas * block_outputs * padded_tokens(tokens) / 4; }
};

inline Plan plan_of(const ProductDesc& desc, Device device) {
  Plan plan{};
  const bool forward = desc.product == Product::forward;
  plan.block_outputs = forward ? desc.block.out : desc.block.in;
  plan.block_depth = forward ? desc.block.in : desc.block.out;
  plan.outputs = forward ? desc.out_features : desc.in_features;
  plan.depth = forward ? desc.in_features : desc.out_features;
  plan.unit_outputs = plan.block_outputs % 32 == 0 ? 32 : 16;
  plan.unit_depth = size_of(desc.dtype) == 2 && plan.block_depth % 32 == 0 ? 32 : 16;
  plan.strips = plan.block_outputs / plan.unit_outputs;
  plan.units = desc.nnz * (plan.block_depth / plan.unit_depth);
  const int tokens = padded_tokens(desc.tokens);
  plan.members = plan.strips * parts_of(tokens);
  const Config config = config_for(tokens);
  if (plan.members > config.warps) return plan;
  plan.teams = config.warps / plan.members;
  // One to a multiprocessor, and work for every warp.
  const int64_t busy = (plan.units + plan.teams - 1) / plan.teams;
  const char* more = getenv("SK_CTAS");
  plan.ctas = std::min<int64_t>(device.multiprocessors * (more ? atoi(more) : 1), busy);
  const UnitSizes unit(static_cast<int>(plan.unit_outputs), static_cast<int>(plan.unit_depth), tokens,
                       size_of(desc.dtype), desc.int8 ? 1 : size_of(desc.dtype));
  const int64_t stage_bytes = unit.of_stage * (plan.strips * unit.bytes + unit.input_bytes);
  const int64_t rest = shared_rest(static_cast<int>(plan.unit_outputs), tokens);
  plan.stages = std::min<int64_t>(
      kMaxStages, (device.shared_bytes_for(config.ctas) - rest) / (plan.teams * stage_bytes));
  plan.ring_bytes = plan.stages * stage_bytes;
  plan.shared_bytes = rest + plan.teams * plan.ring_bytes;
  if (is_ordered(plan.unit_depth * size_of(desc.dtype), tokens)) {
    plan.ordered_bytes = (plan.depth + plan.block_depth - 1) / plan.block_depth * plan.block_depth *
                         tokens * size_of(desc.dtype);
  }
  return plan;
}

// Microseconds of the kernels for many tokens, from measurements on an H100 at up to 256 tokens.
// They have tiles of 128 or 256 outputs, so where there are few outputs, most of the chip is idle,
// unless sums are split.
inline double cost_of_many_tokens(const ProductDesc& desc, const Plan& plan, int multiprocessors) {
  if (sm90::strips::takes_block(desc.block)) {
    return sm90::strips::plan_of(desc, multiprocessors / sm90::strips::kCluster).time;
  }
  const int64_t side = std::min(desc.block.out, desc.block.in);
  const bool panels = side % 64 == 0;
  const int64_t tile_outputs = panels ? 128 : 256;
  const int64_t tiles =
      (plan.outputs + tile_outputs - 1) / tile_outputs * ((desc.tokens + 255) / 256);
  const auto rounds = static_cast<double>((tiles + multiprocessors - 1) / multiprocessors);
  const double stage = panels ? 0.22 : side % 32 == 0 ? 0.42 : 0.5;  // of 64 of the depth
  return rounds * (6 + stage * static_cast<double>(plan.depth) / 64);
}

// Whether passes over W, of kMaxTokens tokens each, take less time than the kernels for many
// tokens. int8 values have tensor cores only here, and by a dense W. From measurements on an H100,
// int8 at up to 8192 tokens.
inline bool is_fastest(const ProductDesc& desc, const Plan& plan, int multiprocessors) {
  const auto passes = static_cast<double>((desc.tokens + kMaxTokens - 1) / kMaxTokens);
  if (passes <= 1) return true;
  const int64_t side = std::min(desc.block.out, desc.block.in);
  const auto bytes = static_cast<double>(desc.nnz * desc.block.out * desc.block.in) *
                     static_cast<double>(size_of(desc.dtype));
  const double pass = 7 + bytes / (side % 32 == 0 ? 2.2e6 : 0.85e6);
  if (desc.int8) {
    return !desc.dense_product || passes * std::max(pass, 13.5) < dense_weight::cost(desc);
  }
  return passes * pass < cost_of_many_tokens(desc, plan, multiprocessors);
}

}  // namespace block_sparse::cuda::skinny
