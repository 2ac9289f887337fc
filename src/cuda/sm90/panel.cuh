// The panel kernel: y[tokens, M] = x[tokens, K] W for blocks whose sides are multiples of 32,
// computed as yt = Wt xt, so that 64 rows of W, of one or two block rows, are the M of a wgmma and
// tokens its N. One template for forward (M = out) and grad_input (M = in, through the transposed
// index; the blocks are read where they lie). Not for small blocks: strip.cuh. How it is launched
// is in panel.cu.
//
// A tile is a panel (two groups of 64 rows of M, each of one or two block rows) times kTokens
// tokens. Its steps are the block columns that any of its block rows has: x is loaded once for all
// of them (their union), W for the groups that have the block. Three roles, each in a file of its
// own (panel_walk.cuh, panel_load.cuh, panel_multiply.cuh):
//   walker    merges the sorted column lists of the groups, straight from the pattern's index, and
//             sends a Step to each CTA of the cluster. It takes tiles from a counter: patterns are
//             uneven, and whoever is free goes on.
//   loader    waits for room, has the copy engine fetch x and W, and says in a Stage what came.
//   consumers two warpgroups; each multiplies its groups, skips those that lack the block, and
//             stores its part of y through shared memory.
// The CTAs of a cluster work on the same panel at neighbouring tokens: each fetches a share of W
// for all of them.
//
// What limits it is traffic from L2 into shared memory (an SM takes in about 38 bytes a clock):
// hence large tiles, and W shared within the cluster.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/cluster_sm90.hpp>

#include "cuda/sm90/panel_load.cuh"
#include "cuda/sm90/panel_multiply.cuh"
#include "cuda/sm90/panel_walk.cuh"

namespace block_sparse::cuda::sm90 {

template <class T, class Out, class Config, bool kTransposed>
__global__ void __launch_bounds__(kPanelThreads, 1)
    panel_kernel(const __grid_constant__ PanelParams params) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<PanelShared<Config>*>(raw);
  const int rank = static_cast<int>(cute::block_rank_in_cluster());

  if (threadIdx.x == 0) shared.init_barriers();
  cute::cluster_arrive();
  cute::cluster_wait();

  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0) load_panels<Config, kTransposed>(params, shared, rank);
    if (warp == 1 && rank == 0) walk_panels<Config, kTransposed>(params, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    multiply_panels<T, Out, Config, kTransposed>(params, shared, warpgroup);
  }
  cute::cluster_arrive();  // nobody leaves while others may still write into it
  cute::cluster_wait();
}

}  // namespace block_sparse::cuda::sm90
