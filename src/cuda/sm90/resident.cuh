// The resident kernel: y[tokens, M] = x[tokens, K] W for narrow layers, of whose x shared memory
// holds some tokens over all of K. x is brought once and stays; W passes by, as it lies in memory,
// and each piece of it is multiplied with the x that it needs. So nothing is loaded twice and
// nothing is multiplied for absent blocks, whatever their size. One template for forward (M = out)
// and grad_input (M = in, through the transposed index). Not for a K that does not fit: panel.cuh,
// strip.cuh.
//
// A CTA has some tokens and a share of the rows of y's blocks, in shares of equal nnz. Tokens are
// the M of a wgmma, a line (up to 64 outputs of a block row) its N. Its warpgroups are teams, each
// with a warp that loads and a ring of its own for W; they take rows in turn, so that some multiply
// while others store. What limits it is what is done for each piece: some 60 instructions of a
// warp for four wgmmas.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "cuda/overlap.cuh"
#include "cuda/sm90/resident_load.cuh"
#include "cuda/sm90/resident_multiply.cuh"

namespace block_sparse::cuda::sm90::resident_product {

template <class T, class Config, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1)
    resident_kernel(const __grid_constant__ Params params) {
  // The slabs of x come first: they are aligned as a swizzle wants, and so is what follows.
  extern __shared__ __align__(1024) unsigned char slabs[];
  auto& shared = *reinterpret_cast<Shared<Config>*>(slabs + params.slabs * params.slab_bytes());
  const int split = static_cast<int>(blockIdx.x) % params.splits;
  const int token = static_cast<int>(blockIdx.x) / params.splits * params.tile_tokens;
  const int warp = threadIdx.x / 32, loader = warp - kTeams * 4;
  if (loader == 0) {
    if (threadIdx.x % 32 == 0) shared.init_barriers();
    __syncwarp();
    ptx::wait_for_previous_kernel();
    if (threadIdx.x % 32 == 0) load_input(params, slabs, shared, token);
    shared.next_row = share_begin(params.walk, split, params.splits);
    shared.end_row = share_begin(params.walk, split + 1, params.splits);
  }
  __syncthreads();
  if (loader >= 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    ptx::wait_for_previous_kernel();
    load_lines<Config, kTransposed>(params, shared, loader);
  } else {
    cutlass::arch::warpgroup_reg_alloc<104>();
    ptx::wait_for_previous_kernel();
    multiply_lines<T, Config, kTransposed>(params, slabs, shared, warp / 4, token);
  }
}

}  // namespace block_sparse::cuda::sm90::resident_product
