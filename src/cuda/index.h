// Pattern work on the GPU: builds the packed index of a pattern that already lies there, so that a
// change of pattern costs no round trip through the host.
#pragma once

#include <cstdint>

#include "block_sparse/pattern.h"

namespace block_sparse::cuda {

// Fills `packed`, grid.index_size() entries, from BSR indices: crow [block_rows + 1] and col [nnz].
// Trusts what it reads, since looking would need a synchronisation; a corrupt pattern gives an
// unspecified index and no invalid access. The same input gives the same index.
void build_index(const int32_t* crow, const int32_t* col, GridShape grid, int32_t* packed,
                 void* stream);

}  // namespace block_sparse::cuda
