// The loads of a strip kernel: x by one warp, W by three that take turns at the stages. They do
// what the walk says and decide nothing.
#pragma once

#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

// This CTA's share of the tokens of each stage, to the whole cluster.
template <Config kConfig>
__device__ void load_x(const Params& params, Shared<kConfig>& shared, int first_task, int clusters,
                       int rank) {
  constexpr Tile kTile = kConfig.tile;
  const int tile_tokens = tile_tokens_of<kConfig>(params), share = tile_tokens / kCluster;
  const bool speaks = threadIdx.x % 32 == 0;
  const uint32_t full = ptx::address_of(shared.full);
  const uint32_t empty = ptx::address_of(shared.empty);
  const uint32_t x = ptx::address_of(shared.x) + rank * share * kStageDepth * 2;
  Cursor<kTile.stages> at;
  for (int next_task = first_task; next_task < tasks_of<kConfig>(params); next_task += clusters) {
    const Task task = task_of<kConfig>(params, next_task);
    const Raster::Place place = params.raster.at(task.tile);
    const int token = place.token_tile * tile_tokens + rank * share;
    const int all = stages_of(params, __ldg(params.counts + place.panel_cluster));
    const int stages = task.stage_count(all);
    const StageRecord* record = params.records +
                                int64_t{place.panel_cluster * kCluster + rank} * params.stages +
                                task.first_stage(all);
    int next = __ldg(&record->depth);
    for (int stage = 0; stage < stages; ++stage, at.advance()) {
      const int depth = next;
      next = __ldg(&(++record)->depth);  // on its way
      ptx::wait(empty + at.slot * 8, at.lap ^ 1);
      if (speaks) {
        const uint32_t barrier = full + at.slot * 8;
        ptx::arrive_and_expect(barrier, tile_tokens * kStageDepth * 2);
        ptx::load_box_multicast(&params.x, x + at.slot * kTile.stage_bytes(), barrier, token,
                                depth * kStageDepth, (1 << kCluster) - 1);
      }
      __syncwarp();
    }
  }
}

// Every third stage, from `first`; lane i fetches pieces i and i + 32. What is read from memory is
// read two stages of this warp before it is used: one load in the chain of a stage, or a hundred
// instructions, make these warps the limiter of the kernel.
template <Config kConfig>
__device__ void load_w(const Params& params, Shared<kConfig>& shared, int first_task, int clusters,
                       int rank, int first) {
  using Size = Sizes<kConfig>;
  constexpr Tile kTile = kConfig.tile;
  constexpr int kRounds = (Size::kStagePieces + 31) / 32;
  constexpr int kPieceWidth = Size::kRowBytes / 2;
  const int lane = threadIdx.x % 32;
  uint32_t full = ptx::address_of(shared.full);
  uint32_t empty = ptx::address_of(shared.empty);
  uint32_t w = ptx::address_of(shared.w);
  ptx::keep_in_register(full);
  ptx::keep_in_register(empty);
  ptx::keep_in_register(w);

  struct Pieces {
    int at[kRounds];
  };
  const int last_piece = params.piece_capacity - 64;
  const auto read_pieces = [&](const StageRecord& record) {
    Pieces pieces;
    const int32_t* list = params.pieces + min(max(record.first, 0), last_piece) + lane;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) pieces.at[i] = __ldg(list + i * 32);
    return pieces;
  };

  Cursor<kTile.stages> at;
  at.advance(first);
  int stage = first;
  for (int next_task = first_task; next_task < tasks_of<kConfig>(params); next_task += clusters) {
    const Task task = task_of<kConfig>(params, next_task);
    const int panel_cluster = params.raster.at(task.tile).panel_cluster;
    const int panel = panel_cluster * kCluster + rank;
    const int all = stages_of(params, __ldg(params.counts + panel_cluster));
    const int stages = task.stage_count(all);
    const StageRecord* list =
        params.records + int64_t{panel} * params.stages + task.first_stage(all) + stage;
    StageRecord record = read(list), next = read(list + kWLoaders);
    Pieces pieces = read_pieces(record);
    for (; stage < stages; stage += kWLoaders, at.advance(kWLoaders)) {
      list += kWLoaders;
      const StageRecord after = read(list + kWLoaders);
      const Pieces next_pieces = read_pieces(next);
      const auto work_at = [&](int bit) { return static_cast<int>(record.work >> bit & 255); };
      const int count = min(work_at(0), Size::kStagePieces);
      const int slot = min(work_at(8), Size::kRing - 1);
      // Of the stages of other parts none is there: what must be released is the task before.
      const int listed_back = min(max(work_at(16), 1), kTile.stages);
      const int back = kConfig.flexible ? min(listed_back, stage + 1) : listed_back;
      const int early = back < listed_back ? count : min(work_at(24), count);

      // In two steps: a parity says something only of a phase whose predecessor is known to be
      // over, here that of three stages before.
      const auto wait_until_released = [&](int back) {
        const int earlier = static_cast<int>(at.slot) - back;
        if (earlier >= 0) {
          ptx::wait(empty + earlier * 8, at.lap);
        } else {
          ptx::wait(empty + (earlier + kTile.stages) * 8, at.lap ^ 1);
        }
      };
      wait_until_released(max(back, kWLoaders));
      if (back < kWLoaders) wait_until_released(back);

      const uint32_t barrier = full + at.slot * 8;
      if (lane == 0) ptx::arrive_and_expect(barrier, count * Size::kPieceBytes);
      __syncwarp();
      const auto load_pieces = [&](int first, int end) {
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
          const int piece = i * 32 + lane;
          if (piece < first || piece >= end) continue;
          int place = slot + piece;
          if (place >= Size::kRing) place -= Size::kRing;
          ptx::load_box(&params.values, w + place * Size::kPieceBytes, barrier,
                        (pieces.at[i] & ~15) / Size::kLineRows, (pieces.at[i] & 15) * kPieceWidth);
        }
      };
      load_pieces(0, early);
      if (early < count) {
        wait_until_released(max(back - 1, 1));
        load_pieces(early, count);
      }
      record = next;
      next = after;
      pieces = next_pieces;
    }
    stage -= stages;
  }
}

}  // namespace block_sparse::cuda::sm90::strips
