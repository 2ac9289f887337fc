// x in the order in which units meet it, so that what a unit needs lies together: where a row of it is
// 32 bytes, one of each token, they are more requests than L2 takes. A small kernel that runs before
// the other.
#pragma once

#include "cuda/skinny/choice.h"
#include "cuda/skinny/params.h"
#include "cuda/skinny/ptx.cuh"

namespace block_sparse::cuda::skinny {

constexpr int kOrderThreads = 256;

// [units along the depth][kTokens][kDepth], zeros where there is no x; a thread copies 16 bytes.
template <class C>
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(const __grid_constant__ Params params, uint4* ordered, int64_t count) {
  ptx::let_next_kernel_start();
  ptx::wait_for_previous_kernel();
  using T = typename C::T;
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  constexpr int kChunks = C::kDepth / kElements;
  const auto threads = int64_t{gridDim.x} * kOrderThreads;
  for (int64_t i = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x; i < count; i += threads) {
    const int64_t token = i / kChunks % C::kTokens;
    const int64_t depth = i / kChunks / C::kTokens * C::kDepth + i % kChunks * kElements;
    uint4 chunk{};
    if (token < params.tokens && depth < params.depth) {
      chunk = *reinterpret_cast<const uint4*>(static_cast<const T*>(params.x) +
                                              token * params.x_stride + depth);
    }
    ordered[i] = chunk;
  }
}

}  // namespace block_sparse::cuda::skinny
