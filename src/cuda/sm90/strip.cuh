// The strip kernel: a product with small blocks, 16-bit elements and float sums, on Hopper.
// y[tokens, outputs] = x[tokens, depth] Wt, W block-sparse; forward, and grad_input through the
// transposed index. Not for other GPUs, and not for large blocks, where loading x only for the
// columns that are needed is better.
//
// wgmma takes x from registers and W from shared memory: 64 tokens x 32 outputs at a time, so each
// present block is multiplied alone and absent ones cost nothing. A tile is 128 tokens x 11 strips
// of 32 outputs. Per stage of 64 of the depth,
//   one warp loads x (the CTAs of a cluster share the tokens and load a part each),
//   one warp walks the pattern and tells which pieces of W are present,
//   two warps load these into a ring,
//   each consumer warpgroup reads its 64 tokens once, then multiplies by each present strip.
// Tiles are drawn from a counter, since patterns are uneven. Which CTA computes a tile changes no
// bit of it: sums run along the depth, in order.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>

#include "cuda/sm90/strip_load.cuh"
#include "cuda/sm90/strip_multiply.cuh"
#include "cuda/sm90/strip_walk.cuh"

namespace block_sparse::cuda::sm90::strips {

// `Choice::kConfig` says which: nvcc knows no kernels with a struct as a template argument.
template <class Choice>
__global__ void __launch_bounds__(Sizes<Choice::kConfig>::kThreads, 1)
    strip_kernel(const __grid_constant__ Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr Config kConfig = Choice::kConfig;
  using Size = Sizes<kConfig>;
  constexpr int kCluster = kConfig.tile.cluster;
  extern __shared__ unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<kConfig>*>(raw + (-ptx::address_of(raw) & 1023));
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int first_tile = static_cast<int>(blockIdx.x) / kCluster;

  if (threadIdx.x == 0) {
    shared.init_barriers();
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();

  if (threadIdx.x / 128 == kConfig.tile.warpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<Size::kProducerRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
      load_x<kConfig>(params, shared, first_tile, rank);
    } else if (warp == 1) {
      Walk<kConfig>(params, shared, rank).run(first_tile);
    } else {
      load_w<kConfig>(params, shared, warp - 2);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Size::kConsumerRegisters>();
    Multiply<kConfig>(params, shared, rank).run();
  }
  cute::cluster_sync();  // a CTA may not leave while another arrives at its barriers
#endif
}

}  // namespace block_sparse::cuda::sm90::strips
