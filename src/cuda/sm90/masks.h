// Which block columns each block row has, as bits; see masks.cu. Host code.
#pragma once

#include <cstdint>

#include "block_sparse/pattern.h"

namespace block_sparse::cuda::sm90 {

// 32-bit words of the mask of a line (a block row or a block column) that crosses so many others.
// One more than needed: whoever reads a mask word by word may look one ahead.
constexpr int64_t mask_words(int64_t crosses) { return (crosses + 31) / 32 + 1; }

// Fills `masks`, [block_rows, mask_words(block_cols)], or the same of block columns.
void build_masks(const PatternView& pattern, bool transposed, int32_t* masks, void* stream);

}  // namespace block_sparse::cuda::sm90
