// Columns: a dense operand copied into [features / kColumn][tokens][kColumn], each column a cache
// line wide. The tokens of a tile then lie side by side, a constant apart whatever the block, where
// in rows of thousands of features they compete for the same place in a cache.
#pragma once

#include "cpu/math.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

template <class Packed>
inline constexpr int64_t kColumn = 64 / sizeof(Packed);

// Features beyond the last become zero.
template <class Math>
void pack_columns(const typename Math::Storage* from, int64_t stride, int64_t tokens,
                  int64_t features, typename Math::Packed* to, int64_t column_stride) {
  using Packed = typename Math::Packed;
  constexpr int64_t kStep = kLanes<Packed> * Math::kDepth;
  constexpr int64_t kWide = kColumn<Packed> * Math::kDepth, kTogether = 8, kAhead = 8;
  for (int64_t first = 0; first < tokens; first += kTogether) {
    const int64_t last = std::min(tokens, first + kTogether);
    for (int64_t feature = 0; feature < features; feature += kWide) {
      Packed* column = to + feature / kWide * column_stride;
      for (int64_t token = first; token < last; ++token) {
        const typename Math::Storage* row = from + token * stride + feature;
        __builtin_prefetch(row + kAhead * kWide);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kWide; i += kStep) {
          const int64_t left = features - feature - i;
          store(column + token * kColumn<Packed> + i / Math::kDepth,
                left >= kStep ? Math::load(row + i)
                              : Math::load(row + i, std::max<int64_t>(0, left)));
        }
      }
    }
  }
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
