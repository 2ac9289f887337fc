// The few-token kernels for float.
#include "cuda/skinny/launch.cuh"

namespace block_sparse::cuda::skinny {

void launch_f32(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  launch<float>(desc, args, stream);
}

}  // namespace block_sparse::cuda::skinny
