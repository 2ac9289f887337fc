// What Hopper's kernels plan once per pattern: the orders in which panels take block rows and block
// columns, the lists of strips, and the tiles of the sampled product. It lies behind the packed
// index, in one array.
#pragma once

#include <cstdint>

#include "block_sparse/matrix.h"

namespace block_sparse::cuda::sm90 {

// int32 entries; 0 for blocks that these kernels do not take.
int64_t walks_size(GridShape grid, BlockShape block);

// Fills `walks` from the other indices, on the stream: nothing comes back to the host.
void build_walks(const PatternView& pattern, BlockShape block, int32_t* walks, void* stream);

// Points `pattern` to it.
void attach_walks(PatternView& pattern, BlockShape block, const int32_t* walks);

}  // namespace block_sparse::cuda::sm90
