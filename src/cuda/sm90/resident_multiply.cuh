// The consumers of the resident kernel: a warpgroup multiplies all tokens with what its team's
// stages hold, and stores the sums of a line when the line ends.
#pragma once

#include "cuda/sm90/resident_params.cuh"
#include "cuda/sm90/resident_store.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace block_sparse::cuda::sm90::resident_product {

// One lane reads what the stage holds, the one that gives the stage back.
__device__ __forceinline__ Stage broadcast(const uint4& of_first) {
  uint4 words;
  words.x = __shfl_sync(~0u, of_first.x, 0);
  words.y = __shfl_sync(~0u, of_first.y, 0);
  words.z = __shfl_sync(~0u, of_first.z, 0);
  words.w = __shfl_sync(~0u, of_first.w, 0);
  return reinterpret_cast<const Stage&>(words);
}

template <class T, class Config, bool kTransposed>
__device__ void multiply_lines(const Params& params, unsigned char* slabs, Shared<Config>& shared,
                               int team, int token) {
  constexpr Major kMajorW = kTransposed ? Major::MN : Major::K;
  constexpr int kWidth = Config::kWidth;
  // A piece of W: rows along its outputs, or across where it is transposed.
  constexpr uint64_t kPiece = swizzled_operand<(kTransposed ? kWidth : Config::kDepth) * 2>();
  constexpr int kPieceStep = kTransposed ? kWidth * 2 : 2;  // 16 elements along K, in 16 bytes
  constexpr uint64_t kInput = swizzled_operand<kSlab * 2>();
  constexpr int kHalf = kHalfTokens * kSlab * 2 / 16;
  const int lane = threadIdx.x % 32;
  // The low halves of descriptors: what changes from one to the next.
  const auto low = [](uint64_t operand, const void* at) {
    return static_cast<uint32_t>(operand | descriptor_address(ptx::address_of(at)));
  };
  const auto whole = [](uint64_t operand, uint32_t low) { return operand >> 32 << 32 | low; };
  const uint32_t input = low(kInput, slabs);
  uint32_t weights = low(kPiece, shared.pieces[team][0]);
  uint32_t stages = ptx::address_of(&shared.stages[team][0]);
  uint32_t full = ptx::address_of(&shared.full[team][0]);
  ptx::keep_in_register(weights);
  ptx::keep_in_register(stages);
  ptx::keep_in_register(full);
  constexpr uint32_t kEmpty = offsetof(Shared<Config>, empty) - offsetof(Shared<Config>, full);
  LineStore<T, kWidth, Config::kHalves, !kTransposed> store(params, token);

  float sums[Config::kHalves][kWidth / 2];
  const auto clear = [&] {
#pragma unroll
    for (auto& half : sums) {
#pragma unroll
      for (float& sum : half) sum = 0;
    }
  };
  int stage = 0, held = -1;  // the stage that is still being multiplied
  uint32_t parity = 0;
  const auto release = [&] {
    if (held >= 0 && lane == 0) ptx::arrive(full + kEmpty + held * 8);
    held = -1;
  };
  ptx::wait(ptx::address_of(&shared.input_full), 0);
  while (true) {
    clear();
    Stage what;
    do {
      if (!ptx::is_over(full + stage * 8, parity)) {
        cute::warpgroup_wait<0>();
        release();
        ptx::wait(full + stage * 8, parity);
      }
      uint4 words{};
      if (lane == 0) words = ptx::load_shared(stages + stage * sizeof(Stage));
      what = broadcast(words);
      const uint32_t piece = weights + stage * (Config::kStageBytes / 16);
      cute::warpgroup_arrive();
#pragma unroll
      for (int i = 0; i < Config::kStagePieces; ++i) {
        const uint32_t x = input + what.offset(i);
#pragma unroll
        for (int k = 0; k < Config::kDepth / 16; ++k) {
#pragma unroll
          for (int half = 0; half < Config::kHalves; ++half) {
            multiply<T, Major::K, kMajorW>(
                sums[half], whole(kInput, x + half * kHalf + k * 2),
                whole(kPiece, piece + i * (Config::kPieceBytes / 16) + k * kPieceStep), true);
          }
        }
      }
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      release();
      held = stage;
      if (++stage == Config::kStages) {
        stage = 0;
        parity ^= 1;
      }
    } while (what.kind == kMore);
    cute::warpgroup_wait<0>();
    release();
    if (what.line == kEnd) break;
    if (what.kind == kEmptyLine) clear();
    store.line(sums, what.line * kWidth);
  }
}

}  // namespace block_sparse::cuda::sm90::resident_product
