// The reference kernel of the GPU: one thread per output element, any GPU, dtype, block shape and
// size. Last in the list. It runs the functions of src/reference.h, which the CPU tests; it is not
// fast, and not meant to be.
#include "cuda/launch.h"
#include "kernels.h"
#include "reference.h"

namespace block_sparse::cuda {
namespace {

constexpr int kThreads = 256;

// Neighbouring threads take neighbouring elements of an output row.
// One sum after the other in float would be worse than torch's, which are many.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, float>, double, typename Traits<T>::Accumulate>;

template <class T, class Sum = SumOf<T>>
__global__ void __launch_bounds__(kThreads)
    reference_kernel(ProductDesc desc, ProductArgs args, int64_t elements, int64_t cols) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < elements; i += step) {
    reference::element<Sum, T>(desc, args, i / cols, i % cols);
  }
}

int64_t workspace(const ProductDesc&, const Execution&) { return 0; }

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const int64_t cols = reference::output_cols(desc);
  const int64_t elements = reference::output_rows(desc) * cols;
  if (elements == 0) return;  // an empty grid is a launch error
  visit(desc.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    reference_kernel<T><<<ctas_for(elements, kThreads), kThreads, 0, stream_of(execution.stream)>>>(
        desc, args, elements, cols);
  });
  check_cuda(cudaGetLastError(), "cuda_reference");
}

}  // namespace

Kernel reference() { return {"cuda_reference", why_not_served, workspace, run}; }

}  // namespace block_sparse::cuda
