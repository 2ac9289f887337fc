// The sampled product's kernel, device code: dW = dyt x at the present blocks, for Hopper. A tile
// (tiles.h) is 128 gathered outputs times 256 gathered inputs, and the tokens are what is summed
// over. One producer warpgroup loads, two consumer warpgroups multiply 64 outputs each. How it is
// launched is in sampled.cu; in which order x is read for blocks 16 wide is in retile.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include "block_sparse/dtype.h"
#include "cuda/sm90/schedule.h"
#include "cuda/sm90/tiles.h"

namespace block_sparse::cuda::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kProducerWarps = 4;  // one warp alone cannot issue copies fast enough
constexpr int kStages = 4;
constexpr int kUnitBytes = kStepTokens * 2;  // of one feature in one stage
constexpr int kOutBytes = kTileOut * kUnitBytes;
constexpr int kStageBytes = kOutBytes + kTileIn * kUnitBytes;
constexpr int kSums = 128;  // of a consumer's thread: 64 x 256 over a warpgroup

struct SampledShared {
  alignas(1024) char stages[kStages][kStageBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint32_t arrived[2];  // parts of a split tile, as each consumer warpgroup has counted them
};
constexpr int kSharedBytes = sizeof(SampledShared) + 1024;  // to align it

struct SampledArgs {
  Tiling tiling;
  const int32_t* tiles;
  const uint16_t* retiled;  // x as retile.h orders it, for blocks 16 wide
  int64_t retiled_cols;
  void* values;
  int64_t nnz, block_out, block_in;
  int steps;
  float4* partials;    // of the parts of split tiles
  uint32_t* counters;  // zero: two for each split tile
};

// The tiles' array, read with what is corrupt clamped.
struct TileReader {
  const SampledArgs& args;

  __device__ int count() const {
    return static_cast<int>(min(max(int64_t{args.tiles[0]}, int64_t{0}), args.tiling.capacity));
  }
  __device__ const int32_t* record(int tile) const {
    const Tiling& t = args.tiling;
    const int64_t at = args.tiles[t.order_at + tile];
    return args.tiles + t.records_at + min(max(at, int64_t{0}), t.capacity - 1) * t.record_size;
  }
  __device__ uint32_t unit(const int32_t* record, int i) const {
    return static_cast<uint32_t>(record[1 + args.tiling.mask_words + i / 2]) >> i % 2 * 16 &
           kNoUnit;
  }
};

// A position in the ring of stages.
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// What wgmma is told about an operand that lies in units of `unit` features, tokens as rows: the
// swizzle is as wide as a unit.
__device__ inline uint64_t feature_major(int unit) {
  cute::GmmaDescriptor d;
  d.bitfield.layout_type_ = unit == 64 ? 1 : unit == 32 ? 2 : 3;
  d.bitfield.stride_byte_offset_ = unit * 8 * 2 / 16;        // eight tokens further
  d.bitfield.leading_byte_offset_ = unit * kUnitBytes / 16;  // one unit further
  return d;
}
// And about x as retile.h orders it: features as rows.
__device__ inline uint64_t token_major() {
  cute::GmmaDescriptor d;
  d.bitfield.layout_type_ = 1;
  d.bitfield.stride_byte_offset_ = 8 * kUnitBytes / 16;
  d.bitfield.leading_byte_offset_ = 1;
  return d;
}

template <class T, cute::SM90::GMMA::Major kMajorIn, size_t... i>
__device__ inline void multiply(float (&sums)[kSums], uint64_t out, uint64_t in, bool add,
                                std::index_sequence<i...>) {
  namespace gmma = cute::SM90::GMMA;
  using Bf16 = gmma::MMA_64x256x16_F32BF16BF16_SS<gmma::Major::MN, kMajorIn>;
  using F16 = gmma::MMA_64x256x16_F32F16F16_SS<gmma::Major::MN, kMajorIn>;
  using Mma = std::conditional_t<std::is_same_v<T, BFloat16>, Bf16, F16>;
  Mma::fma(out, in, sums[i]..., add ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
}

template <int kUnit>
__device__ void produce(const CUtensorMap& dy, const CUtensorMap& x, const SampledArgs& args,
                        SampledShared& shared, const Schedule& schedule) {
  const Tiling& t = args.tiling;
  const TileReader reader{args};
  const int lane = threadIdx.x % 32;
  // A lane has one unit. The first lanes of each warp: the lanes of a warp issue one by one.
  const int slot = lane * kProducerWarps + threadIdx.x % kWarpgroup / 32;
  const bool is_row = slot < t.rows;
  const int to =
      is_row ? slot * t.unit_out * kUnitBytes : kOutBytes + (slot - t.rows) * kUnit * kUnitBytes;
  Cursor at;
  Work work;
  for (int i = 0; schedule.get(i, work); ++i) {
    const int32_t* record = reader.record(work.tile);
    uint32_t unit = lane < t.rows + t.cols ? reader.unit(record, lane) : kNoUnit;
    const int end = lane < t.rows ? t.row_units : t.col_units;
    const uint32_t present = __ballot_sync(~0u, unit < end);
    const int bytes =
        (__popc(present & ((1u << t.rows) - 1)) * t.unit_out + __popc(present >> t.rows) * kUnit) *
        kUnitBytes;
    unit = __shfl_sync(~0u, unit, slot % 32);
    const bool mine = slot < 32 && (present >> slot % 32 & 1);
    for (int step = work.begin; step < work.end; ++step) {
      cutlass::arch::ClusterBarrier::wait(&shared.empty[at.stage], at.phase ^ 1);
      uint64_t* full = &shared.full[at.stage];
      // All warps arrive, so that none can fall behind by two phases, which look alike.
      if (lane == 0) {
        cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(full, slot == 0 ? bytes : 0);
      }
      __syncwarp();
      if (mine) {
        constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
        char* target = shared.stages[at.stage] + to;
        if (is_row) {
          cute::SM90_TMA_LOAD_2D::copy(&dy, full, kHint, target, unit * t.unit_out,
                                       step * kStepTokens);
        } else if constexpr (kUnit == 16) {
          const int64_t row = step * args.retiled_cols + unit * kUnit;
          cute::SM90_BULK_COPY_G2S::copy(args.retiled + row * kStepTokens, full, target,
                                         kUnit * kUnitBytes);
        } else {
          cute::SM90_TMA_LOAD_2D::copy(&x, full, kHint, target, unit * kUnit, step * kStepTokens);
        }
      }
      at.advance();
    }
  }
}

// The sums of one part of a split tile go to memory; the warpgroup that comes last adds all parts
// up, in their order whoever is last. Returns whether this is the last.
__device__ inline bool join_parts(float (&sums)[kSums], const SampledArgs& args, const Work& work,
                                  SampledShared& shared) {
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  const auto part = [&](int p) {
    return args.partials +
           ((int64_t{p} * work.split_tiles + work.split_tile) * 2 + group) *
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
    shared.arrived[group] = atomicAdd(args.counters + work.split_tile * 2 + group, 1u) + 1;
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

template <class T>
__device__ inline uint32_t pack(float a, float b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Among the four lanes of a quad: lane q gets everybody's v[q].
__device__ inline void transpose(uint32_t (&v)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int d = 1; d <= 2; d *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const uint32_t other = __shfl_xor_sync(~0u, q & d ? v[i] : v[i | d], d);
      if (q & d) {
        v[i] = other;
      } else {
        v[i | d] = other;
      }
    }
  }
}

// Stores 16 rows of a unit, of which a warp has the sums: accumulator j of eight columns, as wgmma
// lays them out.
template <class T, int kUnit>
__device__ inline void store_unit(const float* sums, T* to, int64_t row_stride) {
  const int lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = to + (lane / 4 + 8 * half) * row_stride;
    const auto pair = [&](int j) {
      return pack<T>(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
    };
    if constexpr (kUnit == 16) {  // retile.h orders columns so that a lane's are neighbours
      *reinterpret_cast<uint2*>(row + q * 4) = make_uint2(pair(0), pair(1));
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

// Stores what the tile owns of this warp's 16 rows.
template <class T, int kUnit>
__device__ inline void store_tile(const float (&sums)[kSums], const SampledArgs& args,
                                  const int32_t* record) {
  constexpr int kCols = kTileIn / kUnit;
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
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    const int64_t to = __shfl_sync(~0u, offset, c);
    if (to < 0) continue;
    store_unit<T, kUnit>(sums + c * (kUnit / 2), static_cast<T*>(args.values) + to, args.block_in);
  }
}

template <class T, int kUnit>
__device__ void consume(const SampledArgs& args, SampledShared& shared, const Schedule& schedule) {
  using cute::SM90::GMMA::Major;
  constexpr Major kMajorIn = kUnit == 16 ? Major::K : Major::MN;
  const Tiling& t = args.tiling;
  const int group = threadIdx.x / kWarpgroup;
  const bool leader = threadIdx.x % kWarpgroup == 0;
  // Descriptors count in 16 bytes. 16 tokens further is so much further in memory:
  const int step_out = t.unit_out * 2;
  constexpr int kStepIn = kUnit == 16 ? 2 : kUnit * 2;
  const uint32_t base = cute::cast_smem_ptr_to_uint(shared.stages) / 16;
  const uint64_t all_out = feature_major(t.unit_out) + base + group * (kOutBytes / 2 / 16);
  const uint64_t all_in =
      (kUnit == 16 ? token_major() : feature_major(kUnit)) + base + kOutBytes / 16;

  float sums[kSums];
  Cursor at;
  Work work;
  for (int i = 0; schedule.get(i, work); ++i) {
    const int32_t* record = TileReader{args}.record(work.tile);
    int held = -1;
    for (int step = work.begin; step < work.end; ++step) {
      cutlass::arch::ClusterBarrier::wait(&shared.full[at.stage], at.phase);
      const uint64_t out = all_out + at.stage * (kStageBytes / 16);
      const uint64_t in = all_in + at.stage * (kStageBytes / 16);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kStepTokens / 16; ++k) {
        multiply<T, kMajorIn>(sums, out + k * step_out, in + k * kStepIn,
                              k > 0 || step > work.begin, std::make_index_sequence<kSums>{});
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (leader && held >= 0) cutlass::arch::ClusterBarrier::arrive(&shared.empty[held]);
      held = at.stage;
      at.advance();
    }
    cute::warpgroup_wait<0>();
    if (leader) cutlass::arch::ClusterBarrier::arrive(&shared.empty[held]);
#pragma unroll
    for (int j = 0; j < kSums; ++j) cute::warpgroup_fence_operand(sums[j]);
    if (work.parts > 1 && !join_parts(sums, args, work, shared)) continue;
    store_tile<T, kUnit>(sums, args, record);
  }
}

template <class T, int kUnit>
__global__ void __launch_bounds__(kThreads, 1)
    sampled_kernel(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap x,
                   const __grid_constant__ SampledArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char raw[];
  const uint32_t misaligned = cute::cast_smem_ptr_to_uint(raw) % 1024;
  auto& shared = *reinterpret_cast<SampledShared*>(raw + (misaligned ? 1024 - misaligned : 0));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      cutlass::arch::ClusterBarrier::init(&shared.full[i], kProducerWarps);
      cutlass::arch::ClusterBarrier::init(&shared.empty[i], 2);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const Schedule schedule(TileReader{args}.count(), gridDim.x, args.steps, blockIdx.x);
  if (threadIdx.x / kWarpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    produce<kUnit>(dy, x, args, shared, schedule);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    consume<T, kUnit>(args, shared, schedule);
  }
#endif
}

}  // namespace block_sparse::cuda::sm90
