// Zeroes blocks of many tensors with few launches: methods that keep dead blocks do it for all
// layers after every step of the optimizer, and a launch for each layer costs more than its work.
#pragma once

#include <span>

#include "blocks_to_zero.h"

namespace block_sparse::cuda {

// On the current device. Entries that name no block are skipped: looking at them before would need
// a synchronisation.
void zero_blocks(std::span<const BlocksToZero> tensors, void* stream);

}  // namespace block_sparse::cuda
