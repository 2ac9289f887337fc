// The strip kernels of grad_input. Apart from those of forward only to compile in parallel.
#include "cuda/sm90/strip_launch.cuh"

namespace block_sparse::cuda::sm90::strips {

template void launch_for_block<true>(const ProductDesc& desc, const ProductArgs& args,
                                     const Plan& plan, cudaStream_t stream);

}  // namespace block_sparse::cuda::sm90::strips
