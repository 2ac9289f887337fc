// How the resident kernel cuts a product for a GPU: the tokens of a CTA, and how many CTAs share
// the rows of these tokens. A cost decides, of a few rates that were measured on an H100
// (docs/notebook.md). No device code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/sm90/sides.h"

namespace block_sparse::cuda::sm90::resident_product {

// Features that sums are over: shared memory holds those of 96 tokens.
constexpr int64_t kMaxDepth = 1024;
constexpr int64_t kInputBytes = 192 << 10;

// Of x, in slabs of 64 features: as far as blocks reach, which may be further than x.
inline int64_t slabs_of(const Sides& s) {
  const int64_t depth = (s.k + s.block_k - 1) / s.block_k * s.block_k;
  return (depth + 63) / 64;
}
inline int64_t token_bytes(const Sides& s) { return slabs_of(s) * 128; }

struct Plan {
  int tokens;
  int splits;
  double clocks;
};

inline Plan plan_of(const ProductDesc& desc, int multiprocessors) {
  constexpr double kStart = 3500, kLoad = 38, kStore = 41;  // clocks, bytes a clock
  constexpr int64_t kMaxSplits = 64;
  const Sides s = sides(desc);
  const auto most = static_cast<int>(std::min<int64_t>(kInputBytes / token_bytes(s), 128) / 8 * 8);
  const int64_t rows = (s.m + s.block_m - 1) / s.block_m;
  const double kilo_weights = static_cast<double>(desc.nnz * desc.block.out * desc.block.in) / 1024;
  Plan best{most, 1, 1e30};
  for (const int tokens : {most, 64}) {
    // Clocks for 1024 weights.
    const double rate = tokens > 64 ? (s.block_m >= 64   ? 118
                                       : s.block_m == 32 ? 146
                                                         : 296)
                                    : (s.block_m >= 64   ? 92
                                       : s.block_m == 32 ? 125
                                                         : 264);
    const int64_t tiles = (desc.tokens + tokens - 1) / tokens;
    for (int64_t splits = 1; splits <= std::min(rows, kMaxSplits); ++splits) {
      const int64_t rounds = (tiles * splits + multiprocessors - 1) / multiprocessors;
      const double work = kilo_weights * rate + static_cast<double>(tokens * s.m * 2) / kStore;
      const double clocks = static_cast<double>(rounds) *
                            (kStart + static_cast<double>(tokens * token_bytes(s)) / kLoad +
                             work / static_cast<double>(splits));
      if (clocks < best.clocks) best = {tokens, static_cast<int>(splits), clocks};
    }
  }
  return best;
}

}  // namespace block_sparse::cuda::sm90::resident_product
