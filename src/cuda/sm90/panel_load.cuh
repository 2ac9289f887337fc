// The loader of a panel kernel: one warp of each CTA has the copy engine fetch x and W for each
// step that the walker sent, and tells the consumers. Which steps there are it does not decide.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/sm90/panel_params.cuh"

namespace block_sparse::cuda::sm90 {

constexpr int kNowhere = 0x7fffff00;  // a row outside of any array
constexpr int kNoPanel = -2;          // nor kEnd
// x and W are read again and again; y, which passes by, must not push them out of L2.
constexpr uint64_t kKeepInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

template <class Config, bool kTransposed>
__device__ void load_panels(const PanelParams& params, PanelShared<Config>& shared, int rank) {
  constexpr int kCluster = Config::kCluster;
  constexpr int kLines = Config::kLines;
  constexpr int kGroupLines = Config::kGroupLines;

  const int lane = threadIdx.x % 32;
  const int parts = params.walk.block_m / Config::kLineRows;
  const uint32_t input_bytes = params.tile_tokens * Config::kSlab * 2;
  int step_slot = 0, head = 0, tail = 0, in_flight = 0;
  int free = Config::kSlots, next_slot = 0;
  uint32_t step_parity = 0, empty_parity = 0;
  uint32_t taken = 0;  // slots of the stages in flight, four bits each, the newest lowest
  int panel = kNoPanel, part = 0;
  while (panel != kEnd) {
    const uint32_t step_full = ptx::address_of(&shared.step_full[step_slot]);
    ptx::wait(step_full, step_parity);
    const Step step = shared.steps[step_slot];
    __syncwarp();
    if (lane == 0) {
      shared.expect_step(step_slot);
      ptx::arrive_remote(ptx::at_rank(ptx::address_of(&shared.step_empty[step_slot]), 0));
    }
    if (++step_slot == Config::kSteps) {
      step_slot = 0;
      step_parity ^= 1;
    }
    if (step.panel != panel) {
      panel = step.panel;
      part = (panel * kLines + lane) % parts * Config::kLineRows;
    }

    // The pieces go to the next slots, in the order of groups; the CTAs fetch them in turn. Where
    // one line of a group lacks the block, zeros come from outside of the array.
    uint32_t slots = 0;
    int count = 0, my_slot = -1, my_row = kNowhere;
#pragma unroll
    for (int g = 0; g < kConsumers; ++g) {
      bool present = false;
#pragma unroll
      for (int i = 0; i < kGroupLines; ++i) present |= step.row[g * kGroupLines + i] >= 0;
      int slot = next_slot + count;
      slot = slot < Config::kSlots ? slot : slot - Config::kSlots;
      slots |= (present ? slot : kAbsent) << (8 * g);
#pragma unroll
      for (int i = 0; i < kGroupLines; ++i) {
        const bool fetch = (count * kGroupLines + i) % kCluster == rank;
        if (present && fetch && lane == g * kGroupLines + i) {
          my_slot = slot;
          if (step.row[lane] >= 0) my_row = step.row[lane];
        }
      }
      count += present;
    }
    while (in_flight == Config::kStages || free < count) {
      ptx::wait(ptx::address_of(&shared.empty[tail]), empty_parity);
      if (++tail == Config::kStages) {
        tail = 0;
        empty_parity ^= 1;
      }
      --in_flight;
      free += taken >> (4 * in_flight) & 0xf;
    }
    if (lane == 0) {
      // Of a cluster's tokens, those of this CTA may all be past the end: W is multiplied with what
      // is there, since nobody stores the result.
      const bool tokens = count && step.token < params.tokens;
      shared.stages[head] = {panel, step.token, slots, step.within & 1};
      ptx::arrive_and_expect(ptx::address_of(&shared.full[head]),
                             (tokens ? input_bytes : 0) + count * Config::kPieceBytes);
      if (tokens) {
        cute::SM90_TMA_LOAD_2D::copy(&params.input, &shared.full[head], kKeepInL2,
                                     shared.input[head], step.column, step.token);
      }
    }
    __syncwarp();
    if (my_slot >= 0) {
      const int along = kTransposed ? part : step.within >> 1;
      unsigned char* to =
          shared.pieces[my_slot] + lane % kGroupLines * (Config::kPieceBytes / kGroupLines);
      if constexpr (kCluster == 1) {
        cute::SM90_TMA_LOAD_2D::copy(&params.values, &shared.full[head], kKeepInL2, to, along,
                                     my_row);
      } else {
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&params.values, &shared.full[head],
                                               (1 << kCluster) - 1, kKeepInL2, to, along, my_row);
      }
    }
    if (++head == Config::kStages) head = 0;
    ++in_flight;
    free -= count;
    next_slot += count;
    if (next_slot >= Config::kSlots) next_slot -= Config::kSlots;
    taken = taken << 4 | count;
  }
}

}  // namespace block_sparse::cuda::sm90
