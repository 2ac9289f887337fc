// The walker of a panel kernel: one warp of a cluster takes tiles and lists their steps for the
// loaders of all its CTAs. It loads nothing but the index.
#pragma once

#include <climits>

#include "cuda/sm90/panel_params.cuh"

namespace block_sparse::cuda::sm90 {

template <class Config, bool kTransposed>
__device__ void walk_panels(const PanelParams& params, PanelShared<Config>& shared) {
  constexpr int kCluster = Config::kCluster;
  constexpr int kLines = Config::kLines;

  const int lane = threadIdx.x % 32;
  const PanelWalk& w = params.walk;
  const int tiles = static_cast<int>(params.raster.tiles());
  int slot = 0;
  uint32_t parity = 1;
  auto emit = [&](int4 head, int row) {  // `row`: lane i has that of line i
    int4 rows;
    rows.x = __shfl_sync(~0u, row, 0);
    rows.y = __shfl_sync(~0u, row, 1);
    rows.z = kLines > 2 ? __shfl_sync(~0u, row, 2) : -1;
    rows.w = kLines > 3 ? __shfl_sync(~0u, row, 3) : -1;
    ptx::wait(ptx::address_of(&shared.step_empty[slot]), parity);
    const int token = head.y;
    if constexpr (kCluster == 1) {
      if (lane == 0) {
        shared.steps[slot] = {head.x, token, head.z, head.w, {rows.x, rows.y, rows.z, rows.w}};
        ptx::arrive(ptx::address_of(&shared.step_full[slot]));
      }
    } else if (lane < 2 * kCluster) {  // half a step to each CTA
      const int rank = lane / 2, half = lane % 2;
      ptx::send(
          ptx::at_rank(ptx::address_of(&shared.steps[slot]) + half * 16, rank),
          half == 0 ? make_int4(head.x, token + rank * params.tile_tokens, head.z, head.w) : rows,
          ptx::at_rank(ptx::address_of(&shared.step_full[slot]), rank));
    }
    if (++slot == Config::kSteps) {
      slot = 0;
      parity ^= 1;
    }
  };
  // The first tile of a cluster is its own; the others are taken from a counter, if there are any.
  const int clusters = static_cast<int>(gridDim.x) / kCluster;
  auto take = [&] {
    if (tiles <= clusters) return tiles;
    return clusters + __shfl_sync(~0u, lane == 0 ? atomicAdd(params.next_tile, 1) : 0, 0);
  };
  for (int tile = static_cast<int>(blockIdx.x) / kCluster, next; tile < tiles; tile = next) {
    next = take();
    int panel, tokens;
    params.raster.at(tile, panel, tokens);
    const int token = tokens * kCluster * params.tile_tokens;
    int entry = 0, end = 0, part = 0;
    if (lane < kLines) {
      const auto rows = w.at(panel * kLines + lane, Config::kLineRows);
      part = rows.part;
      if (rows.line >= 0) {
        entry = w.clamp(w.start[rows.line]);
        end = w.clamp(w.start[rows.line + 1]);
      }
    }
    auto cross = [&] { return entry < end ? w.cross[entry] : INT_MAX; };
    auto block = [&] { return entry >= end ? -1 : kTransposed ? w.perm[entry] : entry; };
    int mine = cross(), my_block = block();
    for (int now = __reduce_min_sync(~0u, mine), after = 0; after != INT_MAX; now = after) {
      const bool present = mine == now && now != INT_MAX;
      const int present_block = present ? my_block : -1;
      if (present) {
        ++entry;
        mine = cross();
        my_block = block();
      }
      after = __reduce_min_sync(~0u, mine);
      // Unsigned: a corrupt index may overflow. The copy engine reads zeros where there is nothing.
      const unsigned first = static_cast<unsigned>(now) * w.block_k;
      const unsigned rows =
          static_cast<unsigned>(present_block) * (kTransposed ? w.block_k : w.block_m);
      for (int within = 0; within < w.block_k; within += Config::kSlab) {
        const bool last = after == INT_MAX && within + Config::kSlab >= w.block_k;
        emit(make_int4(panel, token, static_cast<int>(first + within), within * 2 + last),
             present_block < 0 ? -1 : static_cast<int>(rows + (kTransposed ? within : part)));
      }
    }
  }
  emit(make_int4(kEnd, 0, 0, 1), -1);
}

}  // namespace block_sparse::cuda::sm90
