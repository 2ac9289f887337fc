// The loading warps of the strip kernel: they copy what the walk has found, some x and one W.
// Device code.
#pragma once

#include "cuda/sm80/strip_args.cuh"

namespace block_sparse::cuda::sm80 {

// Calls load(place, ring) for each stage of each tile.
template <class Load>
__device__ void load_stages(const StripArgs& args, StageRing ring, const Load& load) {
  for (int tile = blockIdx.x; tile < args.panels * args.token_tiles; tile += gridDim.x) {
    const TilePlace place = place_of(args, tile);
    for (bool more = true; more; ring.advance()) {
      ptx::wait(ring.planned(), ring.phase());
      more = ring.work(0).depth != kNone;
      if (more) load(place, ring);
      ptx::arrive_with_copies(ring.full());
    }
  }
}

template <class T>
__device__ void load_x(const StripArgs& args, StageRing ring, int warp) {
  constexpr int kChunks = kStageDepth / 8, kStep = kXLoaders * kWarp / kChunks;
  static_assert(kStep % 8 == 0, "all rows of a lane share a swizzle");
  const int lane = threadIdx.x % kWarp, chunk = lane % kChunks;
  const int row = (warp * kWarp + lane) / kChunks;
  const uint32_t lane_to = (row * kChunks + (chunk ^ row % 8)) * 16;
  const int step = static_cast<int>(kStep * args.x_stride);
  load_stages(args, ring, [&](TilePlace place, const StageRing& stage) {
    const int token = place.token_tile * kTileTokens + row;
    const int depth = stage.work(0).depth * kStageDepth + chunk * 8;
    const int rows = depth < args.depth ? args.tokens - token : 0;
    const T* from = static_cast<const T*>(args.x) + token * args.x_stride + depth;
#pragma unroll
    for (int i = 0; i < kTileTokens / kStep; ++i) {
      ptx::copy(stage.x() + lane_to + i * kStep * kStageDepth * 2, from + int64_t{step} * i,
                i * kStep < rows);
    }
  });
}

template <class T, class Piece, bool kTransposed>
__device__ void load_weights(const StripArgs& args, StageRing ring, const Shared& shared) {
  // In memory a piece is outputs x depth, or depth x outputs. A copy moves 8 elements of a row.
  constexpr int kRows = kTransposed ? Piece::kDepth : Piece::kOutputs;
  constexpr int kChunks = (kTransposed ? Piece::kOutputs : Piece::kDepth) / 8;
  constexpr int kStep = kWarp / kChunks;  // rows
  const int lane = threadIdx.x % kWarp, row = lane / kChunks, chunk = lane % kChunks;
  const T* values = static_cast<const T*>(args.values) + int64_t{row} * args.pitch + chunk * 8;
  const uint32_t lane_to = ptx::address_of(shared.weights) + place_in_piece<kChunks>(row, chunk);
  const int first = kTransposed ? row : chunk * 8;
  const int step = kStep * args.pitch;
  uint32_t loaded[kOutputGroups] = {};
  load_stages(args, ring, [&](TilePlace, const StageRing& stage) {
#pragma unroll
    for (int group = 0; group < kOutputGroups; ++group) {
      const StageWork work = stage.work(group);
      // What lies outside of the matrix may be anything, and is never multiplied.
      const int inside = args.depth - work.depth * kStageDepth - first;
#pragma unroll 4
      for (uint32_t left = work.mask; left != 0; left &= left - 1) {
        const int part = (__ffs(left) - 1) / Piece::kWarpStrips;
        const int64_t source = shared.sources[group][loaded[group] % kQueue<Piece>];
        const uint32_t slot = loaded[group]++ % kRing<Piece>;
        const uint32_t to = lane_to + group * kRingBytes + slot * Piece::kBytes;
        const T* from = values + source * kSourceUnit;
#pragma unroll
        for (int j = 0; j < kRows / kStep; ++j) {
          ptx::copy(to + j * kStep * kChunks * 16, from + int64_t{step} * j,
                    inside > part * Piece::kDepth + (kTransposed ? j * kStep : 0));
        }
      }
    }
  });
}

}  // namespace block_sparse::cuda::sm80
