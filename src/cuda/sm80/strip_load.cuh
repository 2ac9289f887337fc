// The loading warps of the strip kernel: they copy what is planned, some x and some W. Device code.
#pragma once

#include "cuda/sm80/strip_args.cuh"

namespace block_sparse::cuda::sm80 {

template <class T>
__device__ void load_x(const StripArgs& args, StageRing ring, int warp) {
  constexpr int kChunks = kStageDepth / 8, kStep = kXLoaders * kWarp / kChunks;
  static_assert(kStep % 8 == 0, "all rows of a lane share a swizzle");
  const int lane = threadIdx.x % kWarp, chunk = lane % kChunks;
  const int row = (warp * kWarp + lane) / kChunks;
  const uint32_t lane_to = (row * kChunks + (chunk ^ row % 8)) * 16;
  const int step = static_cast<int>(kStep * args.x_stride);
  const T* row_from = nullptr;
  int rows = 0;
  for_stages(
      args,
      [&](TilePlace place, const PlannedStage&) {
        const int token = place.token_tile * kTileTokens + row;
        rows = args.tokens - token;
        row_from = static_cast<const T*>(args.x) + token * args.x_stride;
      },
      [&](const PlannedStage& stage, const PlannedStage&) {
        const int depth = stage.depth * kStageDepth + chunk * 8;
        const int inside = depth < args.depth ? rows : 0;
        const T* from = row_from + depth;
        ptx::wait(ring.empty(), ring.phase() ^ 1);
        const uint32_t to = ring.x() + lane_to;
#pragma unroll
        for (int i = 0; i < kTileTokens / kStep; ++i) {
          ptx::copy(to + i * kStep * kStageDepth * 2, from + int64_t{step} * i, i * kStep < inside);
        }
        ptx::arrive_with_copies(ring.full());
        ring.advance();
      });
}

// The pieces of one half of the outputs.
template <class T, class Piece, bool kTransposed>
__device__ void load_weights(const StripArgs& args, StageRing ring, const Shared& shared,
                             int half) {
  // In memory a piece is outputs x depth, or depth x outputs. A copy moves 8 elements of a row.
  constexpr int kRows = kTransposed ? Piece::kDepth : Piece::kOutputs;
  constexpr int kChunks = (kTransposed ? Piece::kOutputs : Piece::kDepth) / 8;
  constexpr int kStep = kWarp / kChunks;  // rows
  const int lane = threadIdx.x % kWarp, row = lane / kChunks, chunk = lane % kChunks;
  const T* values = static_cast<const T*>(args.values) + int64_t{row} * args.pitch + chunk * 8;
  const uint32_t lane_to =
      ptx::address_of(shared.weights[half]) + place_in_piece<kChunks>(row, chunk);
  const int first = kTransposed ? row : chunk * 8, step = kStep * args.pitch;
  // A corrupt index reaches to the last piece.
  const auto last_source = static_cast<uint32_t>(
      (args.nnz * args.block_size - (kRows - 1) * args.pitch - kChunks * 8) / kSourceUnit);

  const auto mask_of = [&](const PlannedStage& stage) {
    return half > 0 ? stage.masks[1] : stage.masks[0];
  };
  // A lane has the sources of one or two pieces of a stage.
  constexpr int kMaxPieces = kHalfGroups * Piece::kWarpBits;
  uint32_t source = 0;
  const auto fetch_sources = [&](const PlannedStage& stage) {
    if (lane >= __popc(mask_of(stage))) return;
    const int at = stage.sources + (half > 0 ? __popc(stage.masks[0]) : 0) + lane;
    source = static_cast<uint32_t>(__ldg(args.plan.sources + min(max(at, 0), args.plan.size - 1)));
  };
  static_assert(kMaxPieces <= kWarp);

  StageRing freed = ring;  // the oldest stage that may still be read
  int held = 0;            // stages from there on
  int used = 0;            // slots of them
  int counts = 0;          // lane i: slots of stage i
  uint32_t loaded = 0;
  for_stages(
      args, [&](TilePlace, const PlannedStage& stage) { fetch_sources(stage); },
      [&](const PlannedStage& stage, const PlannedStage& next) {
        const uint32_t mask = mask_of(stage);
        const int count = __popc(mask);
        while (held == args.stages || used + count > static_cast<int>(kRing<Piece>)) {
          ptx::wait(freed.empty(), freed.phase());
          used -= __shfl_sync(~0u, counts, freed.at());
          freed.advance();
          --held;
        }
        if (lane == ring.at()) counts = count;
        used += count;
        ++held;
        if (lane == 0) {
          ptx::store(ring.masks() + half * 4, mask);
          ptx::arrive(ring.full());
        }
        const uint32_t sources = min(source, last_source);
        fetch_sources(next);  // on their way
        // What lies outside of the matrix may be anything, and is never multiplied.
        const int inside = args.depth - stage.depth * kStageDepth - first;
        const bool edge = args.depth < (stage.depth + 1) * kStageDepth;
        constexpr int kAtOnce = 4;
        for (int i = 0; i < count; i += kAtOnce) {
          uint32_t from_source[kAtOnce];
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p) from_source[p] = __shfl_sync(~0u, sources, i + p);
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p) {
            const T* from = values + int64_t{from_source[p]} * kSourceUnit;
            const uint32_t to = lane_to + (loaded + i + p) % kRing<Piece> * Piece::kBytes;
            const int depth =
                edge ? Piece::part(__fns(mask, 0, i + p + 1)) * Piece::kDepth : -kStageDepth;
#pragma unroll
            for (int j = 0; j < kRows / kStep; ++j) {
              ptx::copy_if(
                  i +
                  p<count, to + j * kStep * kChunks * 16, from + int64_t{step} * j, inside> depth +
                  (kTransposed ? j * kStep : 0));
            }
          }
        }
        loaded += count;
        ptx::arrive_with_copies(ring.full());
        ring.advance();
      });
}

}  // namespace block_sparse::cuda::sm80
