// The loading warps of the strip kernel: they copy what is planned, x and pieces of W. Device code.
#pragma once

#include "cuda/sm80/strip_args.cuh"

namespace block_sparse::cuda::sm80 {

template <class T, class Piece, bool kTransposed>
class Loader {
  // Of x a warp copies so many rows at once, 16 bytes a lane.
  static constexpr int kXChunks = kStageDepth / 8, kXRows = kWarp / kXChunks;
  // In memory a piece is outputs x depth, or depth x outputs.
  static constexpr int kRows = kTransposed ? Piece::kDepth : Piece::kOutputs;
  static constexpr int kChunks = (kTransposed ? Piece::kOutputs : Piece::kDepth) / 8;
  static constexpr int kStep = kWarp / kChunks;  // rows

 public:
  __device__ Loader(const StripArgs& args, StageRing ring, int loader)
      : args_(args), ring_(ring), loader_(loader) {
    const int x_row = lane_ / kXChunks, x_chunk = lane_ % kXChunks;
    x_to_ = (x_row * kXChunks + (x_chunk ^ x_row)) * 16;
    x_step_ = kXRows * args.x_stride;
    const int row = lane_ / kChunks, chunk = lane_ % kChunks;
    values_ = static_cast<const T*>(args.values) + int64_t{row} * args.pitch + chunk * 8;
    weights_to_ = place_in_piece<kChunks>(row, chunk);
    first_ = kTransposed ? row : chunk * 8;
    // A corrupt index reaches to the last piece.
    last_source_ = static_cast<uint32_t>(
        (args.nnz * args.block_size - (kRows - 1) * args.pitch - kChunks * 8) / kSourceUnit);
  }

  __device__ void run() {
    ring_.advance(loader_);
    int i = loader_;  // of the tile's stages, the next one of this warp
    for (int tile = blockIdx.x; tile < args_.panels * args_.token_tiles; tile += gridDim.x) {
      const TilePlace place = place_of(args_, tile);
      const PlannedStage* stages =
          args_.plan.stages + int64_t{place.panel} * 2 * args_.plan.depth_stages;
      const int count = __ldg(args_.plan.counts + place.panel);
      const auto stage_at = [&](int at) -> PlannedStage {
        if (at >= count) return {};
        const int4 words = __ldg(reinterpret_cast<const int4*>(stages + at));
        return {words.x, words.y, {static_cast<uint32_t>(words.z), static_cast<uint32_t>(words.w)}};
      };
      const int token = place.token_tile * kTileTokens + lane_ / kXChunks;
      const T* x = static_cast<const T*>(args_.x) + token * args_.x_stride + lane_ % kXChunks * 8;
      PlannedStage stage = stage_at(i), next = stage_at(i + kLoaders);
      uint32_t source = source_of(stage);
      for (; i < count; i += kLoaders) {
        const PlannedStage after = stage_at(i + 2 * kLoaders);  // on its way
        const uint32_t next_source = source_of(next);
        ptx::wait(ring_.empty(), ring_.phase() ^ 1);
        load_x(x + stage.depth * kStageDepth, args_.tokens - token,
               args_.depth - stage.depth * kStageDepth);
        load_pieces(stage, source);
        if (lane_ == 0) {
          ptx::store(ring_.masks(), stage.masks[0], stage.masks[1]);
          ptx::arrive(ring_.full());
        }
        ptx::arrive_with_copies(ring_.full());
        ring_.advance(kLoaders);
        stage = next;
        next = after;
        source = next_source;
      }
      i -= count;
    }
  }

 private:
  // Lane i: where the i-th piece lies.
  __device__ uint32_t source_of(const PlannedStage& stage) const {
    if (lane_ >= __popc(stage.masks[0]) + __popc(stage.masks[1])) return 0;
    const int at = min(max(stage.sources + lane_, 0), args_.plan.size - 1);
    return min(static_cast<uint32_t>(__ldg(args_.plan.sources + at)), last_source_);
  }

  __device__ __forceinline__ void load_x(const T* from, int rows, int depth) const {
    const int inside = lane_ % kXChunks * 8 < depth ? rows : 0;
    const uint32_t to = ring_.x() + x_to_;
#pragma unroll
    for (int i = 0; i < kTileTokens / kXRows; ++i) {
      // Every other time the rows are the upper four of eight, which are swizzled by 4 more.
      ptx::copy((i % 2 == 0 ? to : to ^ 64) + i * kXRows * kStageDepth * 2, from,
                i * kXRows < inside);
      from += x_step_;
    }
  }

  __device__ __forceinline__ void load_pieces(const PlannedStage& stage, uint32_t source) const {
    const int count_first = __popc(stage.masks[0]), count = count_first + __popc(stage.masks[1]);
    // What lies outside of the matrix may be anything, and is never multiplied.
    const int inside = args_.depth - stage.depth * kStageDepth - first_;
    const bool edge = args_.depth < (stage.depth + 1) * kStageDepth;
    const int step = kStep * args_.pitch;
    uint32_t to = ring_.weights() + weights_to_;
    constexpr int kAtOnce = 4;
    for (int i = 0; i < count; i += kAtOnce) {
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const int piece = i + p;
        const T* from = values_ + int64_t{__shfl_sync(~0u, source, piece)} * kSourceUnit;
        int depth = -kStageDepth;
        if (edge) {
          const int bit = piece < count_first ? __fns(stage.masks[0], 0, piece + 1)
                                              : __fns(stage.masks[1], 0, piece - count_first + 1);
          depth = Piece::part(bit) * Piece::kDepth;
        }
#pragma unroll
        for (int j = 0; j < kRows / kStep; ++j) {
          ptx::copy_if(
              piece<count, to + j * kStep * kChunks * 16, from + int64_t{step} * j, inside> depth +
              (kTransposed ? j * kStep : 0));
        }
        to += Piece::kBytes;
      }
    }
  }

  const StripArgs& args_;
  StageRing ring_;
  const int loader_, lane_ = threadIdx.x % kWarp;
  uint32_t x_to_, weights_to_;  // where this lane writes in a stage, and in a piece
  int64_t x_step_;
  const T* values_;
  int first_;  // of the depth, in a piece
  uint32_t last_source_;
};

}  // namespace block_sparse::cuda::sm80
