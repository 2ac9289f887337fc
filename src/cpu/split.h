// Split: how a product is divided among threads, statically and by the work that each part has:
// patterns are skewed, and a thread that waits for another is lost.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_sparse/product.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// Threads that are worth their fork: it costs as much as a million multiplications or so. (However
// few the tokens, the weights have to be read.)
inline int64_t useful_threads(const ProductDesc& desc, const Execution& execution) {
  constexpr int64_t kWorkPerThread = 1 << 20, kFewTokens = 8;
  const int64_t work =
      desc.nnz * desc.block.out * desc.block.in * std::max(kFewTokens, desc.tokens);
  return std::clamp<int64_t>(work / kWorkPerThread, 1, std::max(1, execution.threads));
}

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, count), in multiples of `unit`.
inline Range even_part(int64_t count, int64_t unit, int64_t index, int64_t parts) {
  const int64_t units = (count + unit - 1) / unit;
  return {std::min(count, units * index / parts * unit),
          std::min(count, units * (index + 1) / parts * unit)};
}

// Of `count` parts, how many divide the tokens; the others divide the outputs. Tokens are all
// alike, so splitting them balances any pattern; only few tokens do not suffice.
inline int64_t parts_by_tokens(int64_t count, int64_t tokens, int64_t tokens_per_part) {
  int64_t parts = count;
  while (parts > 1 && (count % parts != 0 || tokens < parts * tokens_per_part)) --parts;
  return parts;
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
