// cuda_tiled for bf16.
#include "cuda/tiled/launch.cuh"

namespace block_sparse::cuda::tiles {

template void launch<BFloat16>(const ProductDesc& desc, const ProductArgs& args,
                               cudaStream_t stream);

}  // namespace block_sparse::cuda::tiles
