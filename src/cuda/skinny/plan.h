// Plan: how a few-token product is cut for a GPU. Host code, shared by the launch and by the size
// of the workspace.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "block_sparse/product.h"
#include "cuda/dense/choice.h"
#include "cuda/skinny/choice.h"
#include "cuda/sm90/split.h"

namespace block_sparse::cuda::skinny {

// Tokens are computed in eights, and for every count there is a kernel with room for it.
constexpr int kMaxTokens = 64;
constexpr int padded_tokens(int64_t tokens) {
  return tokens <= 8 ? 8 : tokens <= 16 ? 16 : tokens <= 32 ? 32 : kMaxTokens;
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
  // CTAs in teams: those of a team have the same blocks, and of each block other strips, so that
  // little is left of the rows that teams share.
  int64_t team_ctas;
  int64_t teams;
  int64_t strips_per_cta;
  int64_t warps_per_strip;

  int64_t ctas() const { return teams * team_ctas; }
  // Of rows that teams share: a part is of two sums, and each CTA leaves those of one row at most.
  int64_t parts(int64_t tokens) const {
    return ctas() * strips_per_cta * unit_outputs * padded_tokens(tokens) / 2;
  }
};

// Of a row of blocks. In grad_input the CTAs of a team read parts of the same rows of W; from
// this many sums on that costs less than what the CTAs of rows with all strips leave to each other.
constexpr int64_t kManySums = 4096;

inline Plan plan_of(const ProductDesc& desc, int multiprocessors) {
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
  const int warps = config_for(padded_tokens(desc.tokens)).warps;
  const int64_t sums = plan.block_outputs * padded_tokens(desc.tokens);
  plan.team_ctas = forward || sums >= kManySums ? std::gcd(plan.strips, multiprocessors) : 1;
  plan.strips_per_cta = plan.strips / plan.team_ctas;
  if (plan.strips_per_cta > warps) return plan;
  plan.warps_per_strip = warps / plan.strips_per_cta;
  // One CTA to a multiprocessor, and work for every warp.
  const int64_t busy = (plan.units + plan.warps_per_strip - 1) / plan.warps_per_strip;
  plan.teams = std::min(multiprocessors / plan.team_ctas, busy);
  return plan;
}

// Microseconds of the kernels for many tokens, from measurements on an H100 at up to 256 tokens.
// They have tiles of 128 or 256 outputs, so where there are few outputs, most of the chip is idle,
// unless sums are split.
inline double cost_of_many_tokens(const ProductDesc& desc, const Plan& plan, int multiprocessors,
                                  bool hopper) {
  if (hopper && desc.planned && sm90::strips::takes_block(desc.block)) {
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
// int8 at up to 8192 tokens. `hopper`: Hopper's kernels take the product, but for its block shape.
inline bool is_fastest(const ProductDesc& desc, const Plan& plan, int multiprocessors,
                       bool hopper) {
  const auto passes = static_cast<double>((desc.tokens + kMaxTokens - 1) / kMaxTokens);
  if (passes <= 1) return true;
  const int64_t side = std::min(desc.block.out, desc.block.in);
  const auto bytes = static_cast<double>(desc.nnz * desc.block.out * desc.block.in) *
                     static_cast<double>(size_of(desc.dtype));
  const double pass = 7 + bytes / (side % 32 == 0 ? 2.2e6 : 0.85e6);
  if (desc.int8) {
    return !desc.dense_product || passes * std::max(pass, 13.5) < dense_weight::cost(desc);
  }
  return passes * pass < cost_of_many_tokens(desc, plan, multiprocessors, hopper);
}

}  // namespace block_sparse::cuda::skinny
