// The few-token kernels for float16.
#include "cuda/skinny/launch.cuh"

namespace block_sparse::cuda::skinny {

void launch_f16(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  launch<Float16>(desc, args, stream);
}

}  // namespace block_sparse::cuda::skinny
