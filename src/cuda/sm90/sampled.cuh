// The sampled product's kernel, device code: dW = dyt x at the present blocks, for Hopper. A tile
// (tiles.h) is 128 gathered outputs times 256 gathered inputs, and the tokens are what is summed
// over; where tiles are few, a CTA takes a slice of the inputs. One producer warpgroup loads, two
// consumer warpgroups multiply 64 outputs each. How it is launched is in sampled.cu; in which order
// x is read for blocks 16 wide is in retile.cuh.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/sampled_args.cuh"
#include "cuda/sm90/sampled_store.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace block_sparse::cuda::sm90::sampled_product {

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

// What wgmma is told about an operand that lies in pieces of `width` features, tokens as rows: the
// swizzle is as wide as a piece. (x as retile.cuh orders it is a plain swizzled operand.)
__device__ inline uint64_t feature_major(int width) {
  const uint64_t operand = width == 64   ? swizzled_operand<128>()
                           : width == 32 ? swizzled_operand<64>()
                                         : swizzled_operand<32>();
  const uint64_t next = width * kUnitBytes / 16;  // one piece further, in bits 16 and up
  return operand + ((next - 1) << 16);
}

template <int kUnit, int kSlices>
__device__ void produce(const CUtensorMap& dy, const CUtensorMap& x, const SampledArgs& args,
                        SampledShared& shared, const Schedule& schedule) {
  const Tiling& t = args.tiling;
  const TileReader reader{args};
  const int lane = threadIdx.x % 32;
  // A lane has one unit, or a group of rows. The first lanes of each warp: the lanes of a warp
  // issue one by one.
  const int slot = lane * kProducerWarps + threadIdx.x % kWarpgroup / 32;
  constexpr int kCols = kTileIn / kUnit / kSlices;
  const int rows = t.rows / t.group, width = t.unit_out * t.group;
  const bool is_row = slot < rows;
  const int to =
      is_row ? slot * width * kUnitBytes : kOutBytes + (slot - rows) * kUnit * kUnitBytes;
  Cursor at;
  Work work;
  for (int i = 0; schedule.get(i, work); ++i) {
    const int32_t* record = reader.record(work.tile);
    const int entry = lane < rows ? lane * t.group : t.rows + work.slice * kCols + lane - rows;
    uint32_t unit = lane < rows + kCols ? reader.unit(record, entry) : kNoUnit;
    const uint32_t end = lane < rows ? t.row_units : t.col_units;
    const uint32_t present = __ballot_sync(~0u, unit < end);
    const int bytes =
        (__popc(present & ((1u << rows) - 1)) * width + __popc(present >> rows) * kUnit) *
        kUnitBytes;
    unit = __shfl_sync(~0u, unit, slot % 32);
    const bool mine = slot < 32 && (present >> slot % 32 & 1);
    for (int step = work.begin; step < work.end; ++step) {
      ptx::wait(ptx::address_of(&shared.empty[at.stage]), at.phase ^ 1);
      uint64_t* full = &shared.full[at.stage];
      // All warps arrive, so that none can fall behind by two phases, which look alike.
      if (lane == 0) {
        ptx::arrive_and_expect(ptx::address_of(full), slot == 0 ? bytes : 0);
      }
      __syncwarp();
      if (mine) {
        constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
        char* target = shared.stages[at.stage] + to;
        if (is_row) {
          cute::SM90_TMA_LOAD_2D::copy(&dy, full, kHint, target, unit * t.unit_out,
                                       step * kStepTokens);
        } else if constexpr (kUnit <= kMaxRetiledUnit) {
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

template <class T, class Out, int kUnit, int kSlices>
__device__ void consume(const SampledArgs& args, SampledShared& shared, const Schedule& schedule) {
  constexpr Major kMajorIn = kUnit <= kMaxRetiledUnit ? Major::K : Major::MN;
  const Tiling& t = args.tiling;
  const int group = threadIdx.x / kWarpgroup;
  const bool leader = threadIdx.x % kWarpgroup == 0;
  // Descriptors count in 16 bytes. 16 tokens further is so much further in memory:
  const int width = t.unit_out * t.group;
  const int step_out = width * 2;
  constexpr int kStepIn = kUnit <= kMaxRetiledUnit ? 2 : kUnit * 2;
  const uint64_t base = descriptor_address(ptx::address_of(shared.stages));
  const uint64_t all_out = feature_major(width) + base + group * (kOutBytes / 2 / 16);
  const uint64_t all_in =
      (kUnit <= kMaxRetiledUnit ? swizzled_operand<kUnitBytes>() : feature_major(kUnit)) + base +
      kOutBytes / 16;

  constexpr int kSums = sums_of(kSlices);
  float sums[kSums];
  Cursor at;
  Work work;
  for (int i = 0; schedule.get(i, work); ++i) {
    const int32_t* record = TileReader{args}.record(work.tile);
    int held = -1;
    for (int step = work.begin; step < work.end; ++step) {
      ptx::wait(ptx::address_of(&shared.full[at.stage]), at.phase);
      const uint64_t out = all_out + at.stage * (kStageBytes / 16);
      const uint64_t in = all_in + at.stage * (kStageBytes / 16);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < kStepTokens / 16; ++k) {
        multiply<T, Major::MN, kMajorIn>(sums, out + k * step_out, in + k * kStepIn,
                                         k > 0 || step > work.begin);
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (leader && held >= 0) ptx::arrive_remote(ptx::address_of(&shared.empty[held]));
      held = at.stage;
      at.advance();
    }
    cute::warpgroup_wait<0>();
    if (leader) ptx::arrive_remote(ptx::address_of(&shared.empty[held]));
#pragma unroll
    for (int j = 0; j < kSums; ++j) cute::warpgroup_fence_operand(sums[j]);
    if (work.parts > 1 && !join_parts(sums, args, work, shared)) continue;
    store_slice<Out, kUnit>(sums, args, record, work.slice);
  }
}

// Out: of dW.
template <class T, class Out, int kUnit, int kSlices>
__global__ void __launch_bounds__(kThreads, 1)
    sampled_kernel(const __grid_constant__ CUtensorMap dy, const __grid_constant__ CUtensorMap x,
                   const __grid_constant__ SampledArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ char raw[];
  const uint32_t misaligned = ptx::address_of(raw) % 1024;
  auto& shared = *reinterpret_cast<SampledShared*>(raw + (misaligned ? 1024 - misaligned : 0));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::init(ptx::address_of(&shared.full[i]), kProducerWarps);
      ptx::init(ptx::address_of(&shared.empty[i]), 2);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const Schedule schedule(TileReader{args}.count(), kSlices, gridDim.x, args.steps, blockIdx.x);
  if (threadIdx.x / kWarpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    produce<kUnit, kSlices>(dy, x, args, shared, schedule);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    consume<T, Out, kUnit, kSlices>(args, shared, schedule);
  }
#endif
}

}  // namespace block_sparse::cuda::sm90::sampled_product
