// The loader of a team of the resident kernel: one warp that walks over the team's lines, has the
// copy engine bring the pieces of W, and says in a Stage what came. x itself: load_input.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>

#include "cuda/sm90/resident_params.cuh"

namespace block_sparse::cuda::sm90::resident_product {

constexpr int kNowhere = 0x7ffff000;  // outside of any array: the copy engine brings zeros

// One thread.
template <class Config>
__device__ void load_input(const Params& params, unsigned char* slabs, Shared<Config>& shared,
                           int token) {
  const uint32_t full = ptx::address_of(&shared.input_full);
  ptx::arrive_and_expect(full, params.slabs * params.slab_bytes());
  for (int i = 0; i < params.slabs; ++i) {
    ptx::load_box(&params.input, ptx::address_of(slabs + i * params.slab_bytes()), full, token,
                  i * kSlab);
  }
}

// The first row before which there are at least so many blocks.
__device__ inline int row_at(const Walk& walk, int blocks) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = walk.rows;
  while (low < high) {
    const int step = (high - low + 31) / 32, probe = low + (lane + 1) * step - 1;
    const bool before = probe < high && walk.first(probe) < blocks;
    const int count = __popc(__ballot_sync(~0u, before));
    high = min(high, low + (count + 1) * step - 1);
    low = min(high, low + count * step);
  }
  return low;
}

// The first row of a share of all blocks, in whole rows.
__device__ inline int share_begin(const Walk& walk, int share, int shares) {
  if (share == 0) return 0;
  if (share == shares) return walk.rows;
  return row_at(walk, static_cast<int>(int64_t{walk.nnz} * share / shares));
}

template <class Config, bool kTransposed>
__device__ void load_lines(const Params& params, Shared<Config>& shared, int team) {
  constexpr int kPieces = Config::kStagePieces;
  const Walk& w = params.walk;
  const int lane = threadIdx.x % 32, of_stage = lane % kPieces;
  const int slab_size = params.slab_bytes() / 16, max_offset = params.slabs * slab_size;
  const uint32_t full = ptx::address_of(&shared.full[team][0]);
  const uint32_t empty = ptx::address_of(&shared.empty[team][0]);
  const uint32_t stages = ptx::address_of(&shared.stages[team][0]);
  const uint32_t pieces_at =
      ptx::address_of(shared.pieces[team][0]) + of_stage * Config::kPieceBytes;
  int stage = 0;
  uint32_t parity = 1;

  // Up to 32 pieces of a line: lane i has the i-th, or there are not as many.
  struct Chunk {
    int row, part, of_line;  // the first of the line's
    int begin, pieces;       // of the line: its first entry, all pieces
    int entry_of, cross, block;
  };
  // Teams take rows in turn, whoever is free: rows are uneven, and what lies side by side in y is
  // then stored at about the same time.
  const auto take_row = [&](Chunk& chunk) {
    chunk.row = __shfl_sync(~0u, lane == 0 ? atomicAdd(&shared.next_row, 1) : 0, 0);
    chunk.part = chunk.of_line = chunk.pieces = 0;
    if (chunk.row >= shared.end_row) return;
    const int begin = lane < 2 ? w.first(chunk.row + lane) : 0;
    chunk.begin = __shfl_sync(~0u, begin, 0);
    chunk.pieces = max(__shfl_sync(~0u, begin, 1) - chunk.begin, 0) * w.parts_k;
  };
  const auto look_up = [&](Chunk& chunk) {
    const int piece = chunk.of_line + lane;
    if (piece >= chunk.pieces) return;
    chunk.entry_of = chunk.begin + piece / w.parts_k;
    chunk.cross = w.cross[chunk.entry_of];
    if constexpr (kTransposed) chunk.block = w.perm[chunk.entry_of];
  };
  Chunk next{};
  take_row(next);
  look_up(next);
  for (bool is_end = false; !is_end;) {
    const Chunk chunk = next;
    is_end = chunk.row >= shared.end_row;
    next.of_line += 32;
    if (next.of_line >= next.pieces) {
      next.of_line = 0;
      if (++next.part == w.parts_m) {
        take_row(next);
      }
    }
    look_up(next);  // it comes while this one is sent

    // Behind the last row comes a stage that says so. It and lines without blocks are zeros.
    int offset = 0, along_m = kNowhere, along_k = kTransposed ? kNowhere : 0;
    const int piece = chunk.of_line + lane;
    if (piece < chunk.pieces) {
      const int block = kTransposed ? chunk.block : chunk.entry_of;
      const int part_k = piece % w.parts_k * Config::kDepth;
      const int k = chunk.cross * w.block_k + part_k;
      offset = k / kSlab * slab_size + k % kSlab / 8;
      if (static_cast<unsigned>(offset) >= static_cast<unsigned>(max_offset)) offset = 0;
      along_m = chunk.part * Config::kWidth + (kTransposed ? 0 : block * w.block_m);
      along_k = part_k + (kTransposed ? block * w.block_k : 0);
    }
    if constexpr (!kTransposed) along_m /= Order<Config::kWidth>::kOutputs;
    // Zeros are multiplied with x that the line needs anyway: it may hold what is no number.
    const int of_first = __shfl_sync(~0u, offset, lane - of_stage);
    if (piece >= chunk.pieces) offset = of_first;
    uint32_t offsets[kMaxStagePieces / 2] = {static_cast<uint32_t>(offset), 0};
#pragma unroll
    for (int i = 1; i < kPieces; ++i) {
      offsets[i / 2] |= __shfl_down_sync(~0u, offset, i) << (i % 2 * 16);
    }
    const int line = is_end ? kEnd : chunk.row * w.parts_m + chunk.part;
    const int here = min(32, chunk.pieces - chunk.of_line);
    for (int at = 0; at == 0 || at < here; at += kPieces) {
      if (lane - of_stage == at) {
        const uint32_t stage_full = full + stage * 8;
        ptx::wait(empty + stage * 8, parity);
        if (of_stage == 0) {
          const bool last = chunk.of_line + at + kPieces >= chunk.pieces;
          const int kind = chunk.pieces == 0 ? kEmptyLine : last ? kLast : kMore;
          ptx::store_shared(stages + stage * sizeof(Stage), line, kind, offsets[0], offsets[1]);
          ptx::arrive_and_expect(stage_full, Config::kStageBytes);
        }
        const uint32_t to = pieces_at + stage * Config::kStageBytes;
        if constexpr (kTransposed) {
          ptx::load_box(&params.values, to, stage_full, along_k, along_m);
        } else {
          ptx::load_box_5d(&params.values, to, stage_full, along_m, along_k);
        }
      }
      __syncwarp();  // or a lane may be two rounds ahead, and take one parity for another
      if (++stage == Config::kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

}  // namespace block_sparse::cuda::sm90::resident_product
