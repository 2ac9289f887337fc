// The order in which panels take block rows or block columns; see order.cu. Host code.
#pragma once

#include <cstdint>

#include "block_sparse/pattern.h"

namespace block_sparse::cuda::sm90 {

// int32 entries of an order of `lines` block rows (or columns): a multiple of four. An entry of
// `lines` or more stands for none.
constexpr int64_t order_size(int64_t lines) { return (lines + 3) / 4 * 4; }

// Fills `order`. The same pattern gives the same order; where the pattern is too large for the
// search, it is the natural one.
void build_order(const PatternView& pattern, bool transposed, int32_t* order, void* stream);

}  // namespace block_sparse::cuda::sm90
