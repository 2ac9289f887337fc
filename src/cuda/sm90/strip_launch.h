// Declares how strip kernels are started, for those who need not know the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block_sparse/product.h"
#include "cuda/sm90/split.h"

namespace block_sparse::cuda::sm90::strips {

// The kernel for the block's sides; those of 64 and 128 are taken in pieces of 32. `kTransposed`:
// grad_input, else forward.
template <bool kTransposed>
void launch_for_block(const ProductDesc& desc, const ProductArgs& args, const Plan& plan,
                      cudaStream_t stream);

extern template void launch_for_block<false>(const ProductDesc&, const ProductArgs&, const Plan&,
                                             cudaStream_t);
extern template void launch_for_block<true>(const ProductDesc&, const ProductArgs&, const Plan&,
                                            cudaStream_t);

}  // namespace block_sparse::cuda::sm90::strips
