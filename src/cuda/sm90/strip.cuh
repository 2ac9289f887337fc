// The strip kernel: a product with small blocks, 16-bit elements and float sums, on Hopper.
// y[tokens, outputs] = x[tokens, depth] Wt, W block-sparse; forward, and grad_input through the
// transposed index. Not for other GPUs, and not for large blocks, where loading x only for the
// columns that are needed is better.
//
// It computes yt = W xt with W as the register operand of wgmma: each of a warpgroup's four warps
// supplies a strip of 16 outputs, zeros where its block row has no block, and a column that none of
// the 64 outputs needs is skipped. So several block rows share a wgmma and still read x, all of it,
// once for 192 or 256 outputs. Per stage of 64 of the depth,
//   one warp loads x (the CTAs of a cluster share the tokens and load a part each),
//   three warps take turns at loading the pieces of W into a ring,
//   each consumer warpgroup goes through the items of its list: ldmatrix, wgmma.
// What to load, where to and what to multiply was listed with the pattern (strip_walk.h).
// Which CTA computes a tile changes no bit of it: sums run along the depth, in order. Where tiles
// are few they are split along the depth (split.h), and another kernel adds the parts up, in their
// order (strip_join.cuh).
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>

#include "cuda/overlap.cuh"
#include "cuda/sm90/strip_load.cuh"
#include "cuda/sm90/strip_multiply.cuh"

namespace block_sparse::cuda::sm90::strips {

// `Choice::kConfig` says which: nvcc knows no kernels with a struct as a template argument.
template <class Choice>
__global__ void __launch_bounds__(Choice::kConfig.tile.threads(), 1)
    strip_kernel(const __grid_constant__ Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr Config kConfig = Choice::kConfig;
  constexpr Tile kTile = kConfig.tile;
  using Size = Sizes<kConfig>;
  extern __shared__ unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<kConfig>*>(raw + (-ptx::address_of(raw) & 1023));
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int first_task = static_cast<int>(blockIdx.x) / kCluster;
  const int clusters = static_cast<int>(gridDim.x) / kCluster;

  if (threadIdx.x == 0) {
    shared.init_barriers();
    cutlass::arch::fence_barrier_init();
    cute::prefetch_tma_descriptor(&params.x);
    cute::prefetch_tma_descriptor(&params.values);
  }
  for (int i = threadIdx.x; i < Size::kPieceBytes / 16; i += kTile.threads()) {
    reinterpret_cast<uint4*>(shared.w[Size::kRing])[i] = uint4{};
  }
  cute::cluster_sync();
  ptx::wait_for_previous_kernel();  // so far nothing was read that it may write
  ptx::let_next_kernel_start();     // perhaps the one that joins parts

  if (threadIdx.x / 128 == kTile.warpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<kTile.producer_registers>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
      load_x<kConfig>(params, shared, first_task, clusters, rank);
    } else {
      load_w<kConfig>(params, shared, first_task, clusters, rank, warp - 1);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kTile.consumer_registers>();
    Multiply<kConfig>(params, shared, rank).run(first_task, clusters);
  }
  cute::cluster_sync();  // a CTA may not leave while another arrives at its barriers
#endif
}

}  // namespace block_sparse::cuda::sm90::strips
