// Split: how a product is divided among threads, statically and by the work that each part has:
// patterns are skewed, and a thread that waits for another is lost.
#pragma once

#include <algorithm>
#include <cstdint>

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, count), in multiples of `unit`.
inline Range even_part(int64_t count, int64_t unit, int64_t index, int64_t parts) {
  const int64_t units = (count + unit - 1) / unit;
  return {std::min(count, units * index / parts * unit),
          std::min(count, units * (index + 1) / parts * unit)};
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
