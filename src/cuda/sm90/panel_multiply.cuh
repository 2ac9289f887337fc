// The consumers of a panel kernel: each warpgroup multiplies what the stages hold for its group,
// and hands the sums of a tile to store.cuh. What is in a stage was decided before: panel_load.cuh.
#pragma once

#include "cuda/sm90/panel_params.cuh"
#include "cuda/sm90/store.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace block_sparse::cuda::sm90 {

template <class T, class Out, class Config, bool kTransposed>
__device__ void multiply_panels(const PanelParams& params, PanelShared<Config>& shared,
                                int warpgroup) {
  constexpr int kCluster = Config::kCluster;
  constexpr int kLines = Config::kLines;
  constexpr int kGroupLines = Config::kGroupLines;
  constexpr Major kMajorW = kTransposed ? Major::MN : Major::K;
  constexpr int kPieceRowBytes = (kTransposed ? Config::kLineRows : Config::kSlab) * 2;
  constexpr uint64_t kPiece = swizzled_operand<kPieceRowBytes>(
      kTransposed && kGroupLines > 1 ? Config::kPieceBytes / 2 : 16);
  constexpr uint64_t kInput = swizzled_operand<Config::kSlab * 2>();
  constexpr int kPieceStep = kTransposed ? kPieceRowBytes : 2;  // 16 elements along K

  const int lane = threadIdx.x % 32;
  const uint32_t release_at =
      ptx::at_rank(ptx::address_of(&shared.empty[0]), lane < kCluster ? lane : 0);
  auto release = [&](int stage) {
    if (lane < kCluster) ptx::arrive_remote(release_at + stage * sizeof(uint64_t));
  };
  Store<Out, Config::kLineRows, Config::kStoreTokens> store(
      &params.output, shared.output[warpgroup], warpgroup + 1);

  float sums[Config::kSums];
  int stage = 0;
  uint32_t parity = 0;
  while (true) {
#pragma unroll
    for (float& sum : sums) sum = 0;
    Stage what;
    int held = -1;  // the stage that is still being multiplied
    do {
      ptx::wait(ptx::address_of(&shared.full[stage]), parity);
      what = shared.stages[stage];
      // The same for all lanes, and ptxas has to see it: it serialises wgmma in divergent code.
      const uint32_t slot = __shfl_sync(~0u, what.slots, 0) >> (8 * warpgroup) & 0xff;
      if (slot != kAbsent) {
        const uint64_t input = kInput | descriptor_address(ptx::address_of(shared.input[stage]));
        const uint64_t piece = kPiece | descriptor_address(ptx::address_of(shared.pieces[slot]));
        cute::warpgroup_arrive();  // and commit, in the branch: ptxas serialises otherwise
#pragma unroll
        for (int k = 0; k < Config::kSlab / 16; ++k) {
          multiply<T, kMajorW, Major::K>(sums, piece + k * kPieceStep, input + k * 2, true);
        }
        cute::warpgroup_commit_batch();
      }
      // All but the youngest product is done. Where nothing was issued here, that one is of the
      // held stage, and must not be held on to while others wait for its room.
      cute::warpgroup_wait<1>();
      if (slot == kAbsent) cute::warpgroup_wait<0>();
      if (held >= 0) release(held);
      held = stage;
      if (++stage == Config::kStages) {
        stage = 0;
        parity ^= 1;
      }
    } while (!what.last);
    cute::warpgroup_wait<0>();
    release(held);
    if (what.panel == kEnd) break;
#pragma unroll
    for (float& sum : sums) cute::warpgroup_fence_operand(sum);
    int first[kGroupLines];  // row of M of each line, or -1
#pragma unroll
    for (int i = 0; i < kGroupLines; ++i) {
      const auto rows =
          params.walk.at(what.panel * kLines + warpgroup * kGroupLines + i, Config::kLineRows);
      first[i] = rows.line < 0 ? -1 : rows.line * params.walk.block_m + rows.part;
    }
    store.rows(sums, first, what.token, params.tile_tokens, static_cast<const Out*>(params.bias),
               params.features_m, Factors<Out>(params.factors));
  }
  store.finish();
}

}  // namespace block_sparse::cuda::sm90
