// The launch of cuda_tiled for one dtype. Host code; each dtype is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "block_sparse/product.h"

namespace block_sparse::cuda::tiles {

template <class T>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream);

}  // namespace block_sparse::cuda::tiles
