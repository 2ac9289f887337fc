// The strip kernel: y = x Wt and dx = dy W with mma.sync, for any GPU from Ampere on, 16-bit
// elements, blocks with sides that are multiples of 16. Device code; it is launched in strip.cu.
//
// A CTA computes tiles of some tokens x some neighbouring strips of outputs, which may belong to
// different block rows. The sum goes through a ring of stages: x, at the places along the depth
// where at least one block row has a block, and the pieces of W that are present there. So nothing
// is multiplied for absent blocks, and loading the next tile overlaps with the end of the last.
// What is present where is planned before (strip_plan.cuh), once for all tokens.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/sm80/strip_load.cuh"

namespace block_sparse::cuda::sm80 {

template <class T, class Piece, bool kTransposed>
class Multiplier {
  static constexpr int kRowTiles = kWarpTokens / 16, kColumns = kWarpOutputs / 8;
  static constexpr int kStripTiles = Piece::kOutputs / 16;
  static constexpr int kRowBytes = kStageDepth * 2;
  static constexpr int kChunks = (kTransposed ? Piece::kOutputs : Piece::kDepth) / 8;

 public:
  __device__ Multiplier(const StripArgs& args, StageRing ring) : args_(args), ring_(ring) {
    // Of a fragment of 16 outputs (n) x 16 of the depth (k): matrices (n, k), (n, k + 8), (n + 8,
    // k), (n + 8, k + 8).
    const int n = lane_ / 16 * 8, k = lane_ / 8 % 2 * 8;
    weights_ =
        place_in_piece<kChunks>((kTransposed ? k : n) + lane_ % 8, (kTransposed ? n : k) / 8);
    x_ = (token_group_ * kWarpTokens + lane_ % 16) * kRowBytes + (lane_ / 16 ^ lane_ % 8) * 16;
  }

  __device__ void run() {
    for (int tile = blockIdx.x; tile < args_.panels * args_.token_tiles; tile += gridDim.x) {
      clear();
      const TilePlace place = place_of(args_, tile);
      for (int left = __ldg(args_.plan.counts + place.panel); left > 0; --left) {
        ptx::wait(ring_.full(), ring_.phase());
        const uint2 masks = ptx::load(ring_.masks());
        const uint32_t all = half_ > 0 ? masks.y : masks.x;
        const uint32_t mask = all >> first_bit_ & Piece::kWarpMask;
        if (mask != 0) {
          multiply_stage(
              mask, (half_ > 0 ? __popc(masks.x) : 0) + __popc(all & ((1u << first_bit_) - 1)));
        }
        __syncwarp();
        if (lane_ == 0) ptx::arrive(ring_.empty());
        ring_.advance(1);
      }
      store(place);
    }
  }

 private:
  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0;
      }
    }
  }

  // `rank`: of the first piece in the stage.
  __device__ __forceinline__ void multiply_stage(uint32_t mask, int rank) {
    uint32_t piece = ring_.weights() + weights_ + rank * Piece::kBytes;
    constexpr uint32_t kStripMask = (1u << Piece::kWarpStrips) - 1;
#pragma unroll
    for (int part = 0; part < Piece::kParts; ++part) {
      const uint32_t strips = mask >> part * Piece::kWarpStrips & kStripMask;
      if (strips == 0) continue;
#pragma unroll
      for (int k = 0; k < Piece::kDepth; k += 16) {
        multiply_step(part * Piece::kDepth + k, k, strips, piece);
      }
      piece += __popc(strips) * Piece::kBytes;
    }
  }

  // 16 of the depth: those at `depth` of x with those at `k` of the pieces, the first at `from`.
  __device__ __forceinline__ void multiply_step(int depth, int k, uint32_t strips, uint32_t from) {
    uint32_t x[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      ptx::load_matrices<false>(x[m], ring_.x() + (x_ ^ depth * 2) + m * 16 * kRowBytes);
    }
#pragma unroll
    for (int s = 0; s < Piece::kWarpStrips; ++s) {
      if ((strips >> s & 1) == 0) continue;
      uint32_t w[kStripTiles][4];
#pragma unroll
      for (int n = 0; n < kStripTiles; ++n) {
        // A row further down, or two chunks of 16 bytes further along: swizzled, one bit.
        const int down = kTransposed ? k : n * 16, along = kTransposed ? n * 16 : k;
        ptx::load_matrices<kTransposed>(w[n], (from ^ along * 2) + down * kChunks * 16);
      }
#pragma unroll
      for (int n = 0; n < kStripTiles * 2; ++n) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::multiply<T>(sums_[m][s * kStripTiles * 2 + n], x[m], w[n / 2][n % 2 * 2],
                           w[n / 2][n % 2 * 2 + 1]);
        }
      }
      from += Piece::kBytes;
    }
  }

  __device__ void store(TilePlace place) {
    const int quad = lane_ / 4, q = lane_ % 4;
    const int first = place.panel * kTileOutputs + output_group_ * kWarpOutputs;
    const T* bias = static_cast<const T*>(args_.bias);
#pragma unroll
    for (int n = 0; n < kColumns; n += 4) {
      const int output = first + n * 8 + q * 8;
      float add[4][2] = {};
      if (bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int mine = first + (n + i / 2) * 8 + q * 2 + i % 2;
          if (mine < args_.outputs) add[i / 2][i % 2] = block_sparse::load<float>(bias[mine]);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = place.token_tile * kTileTokens + token_group_ * kWarpTokens + m * 16 +
                            half * 8 + quad;
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* sums = sums_[m][n + i] + half * 2;
            words[i] = pack<T>(sums[0] + add[i][0], sums[1] + add[i][1]);
          }
          transpose(words);
          if (token < args_.tokens && output < args_.outputs) {
            T* to = static_cast<T*>(args_.y) + token * args_.y_stride + output;
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
          }
        }
      }
    }
  }

  const StripArgs& args_;
  StageRing ring_;
  uint32_t weights_, x_;  // where this lane reads in a piece, and in a stage of x
  const int lane_ = threadIdx.x % kWarp;
  const int token_group_ = threadIdx.x / kWarp % kTokenGroups;
  const int output_group_ = threadIdx.x / kWarp / kTokenGroups;
  const int half_ = output_group_ / Piece::kHalfGroups;
  const int first_bit_ = output_group_ % Piece::kHalfGroups * Piece::kWarpBits;
  float sums_[kRowTiles][kColumns][4];
};

template <class T, class Piece, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1)
    strip_kernel(const __grid_constant__ StripArgs args) {
  extern __shared__ __align__(128) char shared[];
  const StageRing ring(shared, args.stages);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  const int loader = threadIdx.x / kWarp - kMultipliers;
  if (loader < 0) {
    Multiplier<T, Piece, kTransposed>(args, ring).run();
  } else {
    Loader<T, Piece, kTransposed>(args, ring, loader).run();
  }
}

}  // namespace block_sparse::cuda::sm80
