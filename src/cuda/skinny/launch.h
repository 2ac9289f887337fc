// The launch of a few-token product, one function per dtype of the values: each is compiled in a
// file of its own.
#pragma once

#include <cuda_runtime.h>

#include "block_sparse/product.h"

namespace block_sparse::cuda::skinny {

void launch_bf16(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream);
void launch_f16(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream);
void launch_f32(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream);
void launch_int8(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream);

}  // namespace block_sparse::cuda::skinny
