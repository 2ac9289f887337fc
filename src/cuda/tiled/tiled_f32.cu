// cuda_tiled for f32.
#include "cuda/tiled/launch.cuh"

namespace block_sparse::cuda::tiles {

template void launch<float>(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream);

}  // namespace block_sparse::cuda::tiles
