// Adds up the sums that the strip kernel left of the parts of a tile, and stores them: a small
// kernel that starts while the other one ends. The parts of a tile are added in their order, so the
// result is the same in every run.
#pragma once

#include "cuda/overlap.cuh"
#include "cuda/sm90/strip_store.cuh"

namespace block_sparse::cuda::sm90::strips {

constexpr int kJoinThreads = 256;

// An output of two tokens.
template <class T>
__device__ __forceinline__ void store_pair(const Params& params, int token, int output, float first,
                                           float second) {
  if (output >= params.outputs) return;
  T* to = static_cast<T*>(params.output) + token * params.output_stride + output;
  if (token < params.tokens) *to = round_to<T>(first);
  if (token + 1 < params.tokens) to[params.output_stride] = round_to<T>(second);
}

// A warp for each strip and eight tokens of a tile that is split. `strips`: of a CTA of the other.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(const __grid_constant__ Params params, const int strips) {
  const int lane = threadIdx.x % 32, eights = params.tile_tokens / 8;
  const int at = static_cast<int>(blockIdx.x * (kJoinThreads / 32) + threadIdx.x / 32);
  const int eight = at % eights, strip = at / eights % strips;
  const int rank = at / eights / strips % kCluster, split_tile = at / eights / strips / kCluster;
  if (split_tile >= params.split.last) return;
  ptx::wait_for_previous_kernel();

  const Raster::Place tile = params.raster.at(params.split.whole() + split_tile);
  const int token = tile.token_tile * params.tile_tokens + eight * 8;
  const int output = ((tile.panel_cluster * kCluster + rank) * strips + strip) * kWarpOutputs;
  const int place = output / params.piece_outputs;
  const int first = first_output(params, place, line_at(params, place));
  if (token >= params.tokens || first >= params.outputs) return;

  const auto part = [&](int i) {
    const int piece = i * params.split.last + split_tile;
    return __ldcg(sums_of_part(params, piece, rank, strip, strips, lane) + eight * 32);
  };
  float4 sums = part(0);
#pragma unroll 4
  for (int i = 1; i < params.split.parts; ++i) {
    const float4 more = part(i);
    sums.x += more.x, sums.y += more.y, sums.z += more.z, sums.w += more.w;
  }
  const int from = first + output % params.piece_outputs;
  const float low = bias_of<T>(params, from, 0, lane), high = bias_of<T>(params, from, 1, lane);
  const Factors<T> factors(params.factors);
  store_pair<T>(params, token + lane % 4 * 2, from + lane / 4, factors.times(sums.x) + low,
                factors.times(sums.y) + low);
  store_pair<T>(params, token + lane % 4 * 2, from + 8 + lane / 4, factors.times(sums.z) + high,
                factors.times(sums.w) + high);
}

}  // namespace block_sparse::cuda::sm90::strips
