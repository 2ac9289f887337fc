// The strip kernel: y = x Wt and dx = dy W with mma.sync, for any GPU from Ampere on, 16-bit
// elements, blocks with sides that are multiples of 16. Device code; it is launched in strip.cu.
//
// A CTA computes tiles of some tokens x some neighbouring strips of outputs, which may belong to
// different block rows. The sum goes through a ring of stages: x, at the places along the depth
// where at least one block row has a block, and the pieces of W that are present there, in a ring of
// their own. So nothing is multiplied for absent blocks, and loading the next tile overlaps with the
// end of the last. Here is what is multiplied.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/sm80/strip_load.cuh"
#include "cuda/sm80/strip_walk.cuh"

namespace block_sparse::cuda::sm80 {

template <class T, class Piece, bool kTransposed>
class Multiplier {
  static constexpr int kRowTiles = kWarpTokens / 16, kColumns = kWarpOutputs / 8;
  static constexpr int kSteps = Piece::kDepth / 16, kStripTiles = Piece::kOutputs / 16;
  static constexpr int kFragments = kSteps * kStripTiles;  // of a piece, 16 x 16 each
  static constexpr int kRowBytes = kStageDepth * 2;
  static constexpr int kChunks = (kTransposed ? Piece::kOutputs : Piece::kDepth) / 8;

 public:
  __device__ Multiplier(const StripArgs& args, StageRing ring, Shared& shared)
      : args_(args), ring_(ring) {
    // Of a fragment of 16 outputs (n) x 16 of the depth (k): matrices (n, k), (n, k + 8), (n + 8,
    // k), (n + 8, k + 8).
    const int n = lane_ / 16 * 8, k = lane_ / 8 % 2 * 8;
    weights_ = ptx::address_of(shared.weights[output_group_]) +
               place_in_piece<kChunks>((kTransposed ? k : n) + lane_ % 8, (kTransposed ? n : k) / 8);
    x_ = (token_group_ * kWarpTokens + lane_ % 16) * kRowBytes + (lane_ / 16 ^ lane_ % 8) * 16;
  }

  __device__ void run() {
    for (int tile = blockIdx.x; tile < args_.panels * args_.token_tiles; tile += gridDim.x) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0;
        }
      }
      while (multiply_stage()) {
      }
      store(place_of(args_, tile));
    }
  }

 private:
  // False at the end of the tile.
  __device__ bool multiply_stage() {
    ptx::wait(ring_.full(), ring_.phase());
    const StageWork work = ring_.work(output_group_);
    if (work.mask != 0) {
      uint32_t w[2][4];
      load_fragment(w[0], 0);
#pragma unroll
      for (int p = 0; p < Piece::kParts; ++p) multiply_part(p, work.mask, w);
    }
    __syncwarp();
    if (lane_ == 0) ptx::arrive(ring_.empty());
    ring_.advance();
    return work.depth < kNone;
  }

  __device__ __forceinline__ void load_fragment(uint32_t (&w)[4], int i) const {
    const int n = i % kStripTiles * 16, k = i / kStripTiles * 16;
    // A row further down, or two chunks of 16 bytes further along: swizzled, one bit.
    const int down = kTransposed ? k : n, along = kTransposed ? n : k;
    const uint32_t from = weights_ + slot_ * Piece::kBytes;
    ptx::load_matrices<kTransposed>(w, (from ^ along * 2) + down * kChunks * 16);
  }

  // `w` has the first fragment of the next piece, and so it is left.
  __device__ __forceinline__ void multiply_part(int part, uint32_t mask, uint32_t (&w)[2][4]) {
    constexpr uint32_t kStripMask = (1u << Piece::kWarpStrips) - 1;
    if ((mask >> part * Piece::kWarpStrips & kStripMask) == 0) return;
    uint32_t x[kSteps][kRowTiles][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint32_t from = ring_.x() + (x_ ^ (part * Piece::kDepth + k * 16) * 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        ptx::load_matrices<false>(x[k][m], from + m * 16 * kRowBytes);
      }
    }
#pragma unroll
    for (int s = 0; s < Piece::kWarpStrips; ++s) {
      const int bit = part * Piece::kWarpStrips + s;
      if ((mask >> bit & 1) == 0) continue;
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        const auto load_next = [&] {  // while this one is multiplied
          uint32_t(&next)[4] = w[(i + 1) % kFragments % 2];
          if (i + 1 < kFragments) return load_fragment(next, i + 1);
          slot_ = (slot_ + 1) % kRing<Piece>;
          if (mask >> bit >> 1 != 0) load_fragment(next, 0);
        };
        if (kFragments > 1) load_next();
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = (s * kStripTiles + i % kStripTiles) * 2 + j;
            ptx::multiply<T>(sums_[m][column], x[i / kStripTiles][m], w[i % 2][j * 2],
                             w[i % 2][j * 2 + 1]);
          }
        }
        if (kFragments == 1) load_next();
      }
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
  uint32_t weights_;  // where this lane reads in the first slot of its ring
  uint32_t x_;        // and in a stage of x
  uint32_t slot_ = 0;  // of the next piece
  const int lane_ = threadIdx.x % kWarp;
  const int token_group_ = threadIdx.x / kWarp % kTokenGroups;
  const int output_group_ = threadIdx.x / kWarp / kTokenGroups;
  float sums_[kRowTiles][kColumns][4];
};

template <class T, class Piece, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 1)
    strip_kernel(const __grid_constant__ StripArgs args) {
  extern __shared__ __align__(128) char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  const StageRing ring(shared, args.stages);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  const int warp = threadIdx.x / kWarp - kMultipliers;
  if (warp < 0) {
    Multiplier<T, Piece, kTransposed>(args, ring, shared).run();
  } else if (warp == 0) {
    Walker<Piece, kTransposed>(args, ring, shared).run();
  } else if (warp <= kXLoaders) {
    load_x<T>(args, ring, warp - 1);
  } else {
    load_weights<T, Piece, kTransposed>(args, ring, shared);
  }
}

}  // namespace block_sparse::cuda::sm80
