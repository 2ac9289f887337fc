// The consumers of a strip kernel: x from shared memory into registers, wgmma with the present
// strips of W, and the stores. They know the pattern only as the masks of each stage.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm90_gmma.hpp>  // warpgroup_wait
#include <utility>

#include "cuda/sm90/strip_params.cuh"
#include "cuda/sm90/strip_wgmma.cuh"

namespace block_sparse::cuda::sm90::strips {

template <Dtype kDtype>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (kDtype == Dtype::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <Dtype kDtype>
__device__ inline float2 unpack(uint32_t pair) {
  if constexpr (kDtype == Dtype::bf16) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

// What wgmma is told about a strip in shared memory. 8 rows of a piece make a group of the swizzle.
// Forward, groups follow each other along the outputs; transposed, along the depth, and the second
// piece of a strip is a piece further.
template <Config kConfig>
struct StripLayout {
  using Size = Sizes<kConfig>;
  static constexpr bool kTransposed = kConfig.piece.transposed;
  static constexpr uint32_t kSwizzle = Size::kSwizzleBytes == 64 ? 2 : 3;
  static constexpr uint32_t kHigh = kSwizzle << 30 | Size::kSwizzleBytes * 8 / 16;
  static constexpr uint32_t kLow = (kTransposed ? Size::kPieceBytes / 16 : 1) << 16;
  // In units of the low word, 16 bytes.
  static constexpr uint32_t kStep =
      (kTransposed ? kStepDepth * Size::kSwizzleBytes : kStepDepth * 2) / 16;
  static constexpr uint32_t kStrip = Size::kStripBytes / 16;
};

template <Config kConfig>
class Multiply {
 public:
  using Size = Sizes<kConfig>;
  static constexpr int kStrips = kConfig.tile.strips;
  static constexpr int kCluster = kConfig.tile.cluster;
  static_assert(kStrips == kTileStrips);
  // A stage is multiplied in two halves, whose fragments are loaded in turn.
  static constexpr int kHalfDepth = kStageDepth / 2;
  static constexpr int kHalfColumns = kHalfDepth / kConfig.piece.depth;
  static constexpr int kPieceSteps = kConfig.piece.depth / kStepDepth;
  static constexpr int kHalfSteps = kHalfDepth / kStepDepth;
  using Half = Fragment[kHalfSteps];

  __device__ Multiply(const Params& params, Shared<kConfig>& shared, int rank)
      : params_(params), shared_(shared), rank_(rank), lane_(threadIdx.x % 32) {
    const int row = threadIdx.x / 32 * 16 + lane_ % 16;  // of the tile's tokens
    x_ = ptx::address_of(shared.x) + row * (kStageDepth * 2) + ((lane_ / 16 ^ row % 8) << 4);
    // In a cluster a shared address carries the rank above the 18 bits that a descriptor has.
    ring_.begin = ring_.next =
        StripLayout<kConfig>::kLow | (ptx::address_of(shared.w) & 0x3ffff) >> 4;
    ring_.end = ring_.begin + kConfig.tile.ring * StripLayout<kConfig>::kStrip;
    full_ = ptx::address_of(shared.full);
    empty_ = ptx::at_rank(ptx::address_of(shared.empty), lane_ % kCluster);
  }

  __device__ void run() {
    Sums sums[kStrips];
    Half first, second;
    for (;;) {
      const int tile = arrive_at_stage();
      if (tile < 0) return;
      const Raster::Place place = params_.raster.at(tile, rank_, kCluster);
#pragma unroll
      for (Sums& strip : sums) {
#pragma unroll
        for (float& sum : strip) sum = 0;
      }
      load<0>(first);
      for (int stage = 0;;) {
        settle(issue<0>(sums, first));
        keep(second);
        if (stage > 0) release();
        load<1>(second);
        settle(issue<1>(sums, second));
        keep(first);
        at_.advance();
        if (++stage == params_.stages) break;
        arrive_at_stage();
        load<0>(first);
      }
      cute::warpgroup_wait<0>();
      keep(second);
      settled(sums);
      release();
      store(sums, place);
    }
  }

 private:
  // The tile of the next stage, once it is there. While waiting a consumer holds one stage: the
  // ring of W has room for two.
  __device__ int arrive_at_stage() {
    ptx::wait(full_ + at_.slot * 8, at_.lap);
    const StageWork<kConfig>& work = shared_.work[at_.slot];
#pragma unroll
    for (int i = 0; i < Size::kColumns; ++i) present_[i] = work.present[i];
    // The shuffle tells the compiler that all lanes agree: what follows lives in uniform registers.
    return __shfl_sync(kAllLanes, work.tile, 0);
  }

  template <int kHalf>
  __device__ void load(Half& half) {
#pragma unroll
    for (int i = 0; i < kHalfSteps; ++i) {
      ptx::load_matrices(half[i], (x_ ^ (kHalf * kHalfSteps + i) << 5) + at_.slot * Size::kXBytes);
    }
  }

  // Multiplies half a stage by the strips that are present; how many.
  template <int kHalf>
  __device__ int issue(Sums (&sums)[kStrips], const Half& half) {
    int strips = 0;
#pragma unroll
    for (int column = 0; column < kHalfColumns; ++column) {
      const uint32_t present = present_[kHalf * kHalfColumns + column];
      strips += __popc(present);
      constexpr int kLast = kPieceSteps - 1;
      multiply_present<kConfig.dtype, StripLayout<kConfig>, kPieceSteps, Size::kRowsPerStrip>(
          present, sums, half[column], half[column + kLast], ring_);
    }
    return strips;
  }

  // Waits until no product of an earlier half is under way, when the last one issued `strips`: its
  // last few may be.
  __device__ static void settle(int strips) {
    if (strips >= kConfig.tile.in_flight) {
      cute::warpgroup_wait<kConfig.tile.in_flight>();
    } else {
      cute::warpgroup_wait<0>();
    }
  }

  // A fragment must live until the wait for its products: ptxas does not know that they read it.
  __device__ static void keep(const Half& half) {
#pragma unroll
    for (int i = 0; i < kHalfSteps; ++i) {
      asm volatile("" ::"r"(half[i][0]), "r"(half[i][1]), "r"(half[i][2]), "r"(half[i][3])
                   : "memory");
    }
  }

  // Plain code may touch the sums from here on, and not before.
  __device__ static void settled(Sums (&sums)[kStrips]) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (float& sum : sums[s]) asm volatile("" : "+f"(sum)::"memory");
    }
  }

  // Lane i tells CTA i of the cluster that this warp is done with the stage before the last.
  __device__ void release() {
    if (lane_ < kCluster) ptx::arrive_remote(empty_ + released_.slot * 8);
    released_.advance();
  }

  __device__ void store(const Sums (&sums)[kStrips], const Raster::Place& place) const {
    const int first = first_output(place, lane_);
    uint32_t bias[(kStrips + 1) / 2];
    load_bias(bias, first);
    store_strips(sums, place.token_tile, first, bias, std::make_index_sequence<kStrips>());
  }

  // First output of the row of pieces at a place of the tile; past the end if there is none.
  __device__ int first_output(const Raster::Place& place, int at) const {
    const int row = place.first_strip * Size::kRowsPerStrip + at;
    if (row >= min(place.end_strip * Size::kRowsPerStrip, params_.rows)) return params_.outputs;
    return row_at(params_, row) * kConfig.piece.outputs;
  }

  // The same of columns 16 part to 16 part + 15 of a strip, from the lane that knows its row.
  __device__ int first_output(int first, int strip, int part) const {
    if constexpr (Size::kRowsPerStrip == 2) {
      return __shfl_sync(kAllLanes, first, 2 * strip + part);
    }
    return __shfl_sync(kAllLanes, first, strip) + 16 * part;
  }

  // Lane i of 32 loads pairs i % 16 of strips 2 j + i / 16: one round trip to memory.
  __device__ void load_bias(uint32_t (&bias)[(kStrips + 1) / 2], int first) const {
#pragma unroll
    for (int j = 0; j < (kStrips + 1) / 2; ++j) {
      const int output = first_output(first, 2 * j + lane_ / 16, lane_ / 8 % 2) + lane_ % 8 * 2;
      bias[j] = 0;
      if (params_.bias != nullptr && output < params_.outputs) {
        bias[j] = __ldg(static_cast<const uint32_t*>(params_.bias) + output / 2);
      }
    }
  }

  template <size_t... kStrip>
  __device__ void store_strips(const Sums (&sums)[kStrips], int token_tile, int first,
                               const uint32_t (&bias)[(kStrips + 1) / 2],
                               std::index_sequence<kStrip...>) const {
    (store_strip(sums[kStrip], token_tile, first, bias[kStrip / 2], kStrip), ...);
  }

  // Neighbouring lanes exchange pairs, so that each has four outputs of a token in a row.
  __device__ void store_strip(const Sums& sums, int token_tile, int first, uint32_t bias,
                              int strip) const {
    const bool odd = lane_ & 1;
    const int token = token_tile * Size::kTokens + threadIdx.x / 32 * 16 + lane_ / 4;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int column = first_output(first, strip, part) + (lane_ & 1) * 8 + (lane_ & 2) * 2;
      const int bias_lane = strip % 2 * 16 + part * 8 + lane_ % 4;
      const float2 even_bias = unpack<kConfig.dtype>(__shfl_sync(kAllLanes, bias, bias_lane));
      const float2 odd_bias = unpack<kConfig.dtype>(__shfl_sync(kAllLanes, bias, bias_lane + 4));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* sum = &sums[part * 8 + h * 2];
        const uint32_t even_pair = pack<kConfig.dtype>(sum[0] + even_bias.x, sum[1] + even_bias.y);
        const uint32_t odd_pair = pack<kConfig.dtype>(sum[4] + odd_bias.x, sum[5] + odd_bias.y);
        const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? even_pair : odd_pair, 1);
        if (token + h * 8 < params_.tokens && column < params_.outputs) {
          uint16_t* output = static_cast<uint16_t*>(params_.output) +
                             (token + h * 8) * params_.output_stride + column;
          __stcs(reinterpret_cast<uint2*>(output),
                 odd ? make_uint2(got, odd_pair) : make_uint2(even_pair, got));
        }
      }
    }
  }

  const Params& params_;
  Shared<kConfig>& shared_;
  const int rank_;
  const int lane_;
  uint32_t x_;      // of the row of x that this lane names to ldmatrix
  uint32_t full_;   // the barriers
  uint32_t empty_;  // of the CTA that this lane tells
  Cursor<kConfig.tile.stages> at_;
  Cursor<kConfig.tile.stages> released_;
  uint32_t present_[Size::kColumns] = {};
  StripRing ring_;
};

}  // namespace block_sparse::cuda::sm90::strips
