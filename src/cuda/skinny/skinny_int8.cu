// The few-token kernels for int8 values, whatever the rest is.
#include "cuda/skinny/launch.cuh"

namespace block_sparse::cuda::skinny {

void launch_int8(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  switch (desc.dtype) {
    case Dtype::bf16:
      return launch<BFloat16, int8_t>(desc, args, stream);
    case Dtype::f16:
      return launch<Float16, int8_t>(desc, args, stream);
    default:
      return launch<float, int8_t>(desc, args, stream);
  }
}

}  // namespace block_sparse::cuda::skinny
