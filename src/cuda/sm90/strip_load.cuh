// The loads of a strip kernel: x by one warp, W by two that take turns at the stages. They do what
// the tiles and the records say and decide nothing. In several warps, since a warp issues its
// copies one after the other, and each wait is a round trip.
#pragma once

#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

// This CTA's share of the tokens of each stage, to the whole cluster.
template <Config kConfig>
__device__ void load_x(const Params& params, Shared<kConfig>& shared, int tile, int rank) {
  using Size = Sizes<kConfig>;
  constexpr int kCluster = kConfig.tile.cluster;
  constexpr int kShare = Size::kTokens / kCluster;
  const bool speaks = threadIdx.x % 32 == 0;
  const uint32_t full = ptx::address_of(shared.full);
  const uint32_t empty = ptx::address_of(shared.empty);
  const uint32_t x = ptx::address_of(shared.x) + rank * kShare * kStageDepth * 2;
  TileReader<kConfig> tiles;
  Cursor<kConfig.tile.stages> at;
  for (; tile >= 0; tile = tiles.next(shared)) {
    const int token =
        params.raster.at(tile, rank, kCluster).token_tile * Size::kTokens + rank * kShare;
    for (int stage = 0; stage < params.stages; ++stage, at.advance()) {
      ptx::wait(empty + at.slot * 8, at.lap ^ 1);
      if (speaks) {
        const uint32_t barrier = full + at.slot * 8;
        const uint32_t to = x + at.slot * Size::kXBytes;
        ptx::arrive_and_expect(barrier, Size::kXBytes);
        if constexpr (kCluster == 1) {
          ptx::load_box(&params.x, to, barrier, token, stage * kStageDepth);
        } else {
          ptx::load_box_multicast(&params.x, to, barrier, token, stage * kStageDepth,
                                  (1 << kCluster) - 1);
        }
      }
      __syncwarp();
    }
  }
  ptx::wait(empty + at.slot * 8, at.lap ^ 1);
  if (speaks) ptx::arrive(full + at.slot * 8);
  __syncwarp();
}

// Every second stage, from `first`; lane i fetches pieces i, i + 32, ...
template <Config kConfig>
__device__ void load_w(const Params& params, Shared<kConfig>& shared, int first) {
  using Size = Sizes<kConfig>;
  constexpr int kStages = kConfig.tile.stages;
  constexpr int kPieceWidth = Size::kSwizzleBytes / 2;
  constexpr int kRounds = (Size::kPieces + 31) / 32;
  constexpr int kWords = sizeof(StageWork<kConfig>) / 4;
  const int lane = threadIdx.x % 32;
  const uint32_t full = ptx::address_of(shared.full);
  const uint32_t empty = ptx::address_of(shared.empty);
  const uint32_t w = ptx::address_of(shared.w);
  Cursor<kStages> at;
  Cursor<Size::kRecords> from;
  at.advance(first);
  from.advance(first);
  for (int tile = 0; tile >= 0; at.advance(2), from.advance(2)) {
    ptx::wait(ptx::address_of(&shared.record_full[from.slot]), from.lap);
    const Record<kConfig>& record = shared.records[from.slot];
    tile = record.work.tile;
    const int slot = record.slot;
    const int pieces = record.pieces;
    const int earlier = static_cast<int>(at.slot) - record.back;
    int32_t mine[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) mine[i] = record.piece[min(i * 32 + lane, Size::kPieces - 1)];
    const uint32_t word = reinterpret_cast<const uint32_t*>(&record.work)[lane % kWords];
    __syncwarp();
    if (lane == 0) ptx::arrive(ptx::address_of(&shared.record_empty[from.slot]));

    // Wait for what was in this slot, then for what is in the strips' way: a parity says something
    // only of a phase whose predecessor is known to be over.
    ptx::wait(empty + at.slot * 8, at.lap ^ 1);
    if (earlier >= 0) {
      ptx::wait(empty + earlier * 8, at.lap);
    } else {
      ptx::wait(empty + (earlier + kStages) * 8, at.lap ^ 1);
    }

    if (lane < kWords) reinterpret_cast<uint32_t*>(&shared.work[at.slot])[lane] = word;
    __syncwarp();
    const uint32_t barrier = full + at.slot * 8;
    if (lane == 0) ptx::arrive_and_expect(barrier, pieces * Size::kPieceBytes);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int piece = i * 32 + lane;
      if (piece >= pieces) continue;
      int place = slot * Size::kRowsPerStrip + piece;
      if (place >= kConfig.tile.ring * Size::kRowsPerStrip) {
        place -= kConfig.tile.ring * Size::kRowsPerStrip;
      }
      ptx::load_box(&params.values, w + place * Size::kPieceBytes, barrier, mine[i] & ~15,
                    (mine[i] & 15) * kPieceWidth);
    }
    __syncwarp();
  }
}

}  // namespace block_sparse::cuda::sm90::strips
