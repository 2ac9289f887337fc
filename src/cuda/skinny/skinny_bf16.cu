// The few-token kernels for bfloat16.
#include "cuda/skinny/launch.cuh"

namespace block_sparse::cuda::skinny {

void launch_bf16(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  launch<BFloat16>(desc, args, stream);
}

}  // namespace block_sparse::cuda::skinny
