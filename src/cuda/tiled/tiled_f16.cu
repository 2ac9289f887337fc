// cuda_tiled for f16.
#include "cuda/tiled/launch.cuh"

namespace block_sparse::cuda::tiles {

template void launch<Float16>(const ProductDesc& desc, const ProductArgs& args,
                              cudaStream_t stream);

}  // namespace block_sparse::cuda::tiles
