// From the sums of a tile to dW, device code of the sampled product: the parts of a split tile are
// added up, and what the tile owns is stored block by block.
#pragma once

#include <cutlass/arch/barrier.h>

#include "cuda/fragment.cuh"
#include "cuda/sm90/factors.cuh"
#include "cuda/sm90/sampled_args.cuh"

namespace block_sparse::cuda::sm90::sampled_product {

// The sums of one part of what is split go to memory; the warpgroup that comes last adds all parts
// up, in their order whoever is last. Returns whether this is the last.
template <int kSums>
__device__ bool join_parts(float (&sums)[kSums], const SampledArgs& args, const Work& work,
                           SampledShared& shared) {
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const auto part = [&](int p) {
    return args.partials +
           ((int64_t{p} * work.split_items + work.split_item) * 2 + group) *
               (kSums / 4 * kWarpgroup) +
           thread;
  };
  float4* mine = part(work.part);
#pragma unroll
  for (int i = 0; i < kSums / 4; ++i) {
    __stcg(mine + i * kWarpgroup,
           make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  }
  __threadfence();
  cutlass::arch::NamedBarrier::sync(kWarpgroup, group);
  if (thread == 0) {
    shared.arrived[group] = atomicAdd(args.counters + work.split_item * 2 + group, 1u) + 1;
  }
  cutlass::arch::NamedBarrier::sync(kWarpgroup, group);
  if (shared.arrived[group] != static_cast<uint32_t>(work.parts)) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  for (int p = 0; p < work.parts; ++p) {
    const float4* from = part(p);
#pragma unroll
    for (int i = 0; i < kSums / 4; ++i) {
      const float4 more = __ldcg(from + i * kWarpgroup);
      sums[4 * i] += more.x;
      sums[4 * i + 1] += more.y;
      sums[4 * i + 2] += more.z;
      sums[4 * i + 3] += more.w;
    }
  }
  return true;
}

// Stores 16 rows of a unit, of which a warp has the sums: accumulator j of eight columns, as wgmma
// lays them out.
template <class T, int kUnit>
__device__ inline void store_unit(const float* sums, T* to, int64_t row_stride,
                                  const Factors<T>& factors) {
  const int lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = to + (lane / 4 + 8 * half) * row_stride;
    const auto result = [&](int j, int i) { return factors.times(sums[4 * j + 2 * half + i]); };
    const auto pair = [&](int j) {
      if constexpr (std::is_same_v<T, float>) {
        return make_float2(result(j, 0), result(j, 1));
      } else {
        return pack<T>(result(j, 0), result(j, 1));
      }
    };
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int j = 0; j < kUnit / 8; ++j) {
        // retile.cuh makes a lane's columns neighbours
        const int col = kUnit <= kMaxRetiledUnit ? j / 2 * 16 + q * 4 + j % 2 * 2 : j * 8 + q * 2;
        *reinterpret_cast<float2*>(row + col) = pair(j);
      }
    } else if constexpr (kUnit <=
                         kMaxRetiledUnit) {  // retile.cuh makes a lane's columns neighbours
#pragma unroll
      for (int j = 0; j < kUnit / 8; j += 2) {
        *reinterpret_cast<uint2*>(row + j * 8 + q * 4) = make_uint2(pair(j), pair(j + 1));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kUnit / 8; j += 4) {
        uint32_t v[4] = {pair(j), pair(j + 1), pair(j + 2), pair(j + 3)};
        transpose(v);
        *reinterpret_cast<uint4*>(row + j * 8 + q * 8) = make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
}

// Stores what the tile owns of this warp's 16 rows, in the columns of a slice.
template <class T, int kUnit, int kSums>
__device__ void store_slice(const float (&sums)[kSums], const SampledArgs& args,
                            const int32_t* record, int slice) {
  constexpr int kCols = kTileIn / kUnit, kMine = 2 * kSums / kUnit;
  const Tiling& t = args.tiling;
  const TileReader reader{args};
  const int lane = threadIdx.x % 32;
  const int tile_row = threadIdx.x / 32 * 16;
  const int r = tile_row / t.unit_out;
  const int first_bit = r * kCols;

  // Lane c finds where column c goes.
  uint32_t before = 0;
  for (int word = 0; word < first_bit / 32; ++word) before += __popc(record[1 + word]);
  const uint32_t mask = record[1 + first_bit / 32];
  const int bit = (first_bit + lane % kCols) % 32;
  const int64_t at = static_cast<uint32_t>(record[0]) + before + __popc(mask & ((1u << bit) - 1));
  int64_t block = -1;
  if ((mask >> bit & 1) && at < t.numbers_size()) block = args.tiles[t.numbers_at + at];
  int64_t offset = -1;
  if (block >= 0 && block < args.nnz) {
    const int64_t row = reader.unit(record, r) % t.parts_out * t.unit_out + tile_row % t.unit_out;
    const int64_t col = reader.unit(record, t.rows + lane % kCols) % t.parts_in * kUnit;
    offset = (block * args.block_out + row) * args.block_in + col;
  }
  const Factors<T> factors(args.factors);
#pragma unroll
  for (int c = 0; c < kMine; ++c) {
    const int64_t to = __shfl_sync(~0u, offset, slice * kMine + c);
    if (to < 0) continue;
    store_unit<T, kUnit>(sums + c * (kUnit / 2), static_cast<T*>(args.values) + to, args.block_in,
                         factors);
  }
}

}  // namespace block_sparse::cuda::sm90::sampled_product
