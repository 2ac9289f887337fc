// Which CTA of the sampled product takes which tile, and which of its tokens. All tiles cost the
// same, so they are dealt in turn: CTAs stay at the same tokens and find dy and x in the L2 cache.
// Tiles that are too few for one more round may be split along the tokens.
#pragma once

#include <cstdint>

#include "block_sparse/host_device.h"

namespace block_sparse::cuda::sm90 {

constexpr int kStepTokens = 64;  // what a stage of the kernel holds
constexpr int kMaxParts = 16;
constexpr int kMaxPartRounds = 2;

// In how many parts the tiles of the last, incomplete round are split.
BLOCK_SPARSE_HOST_DEVICE constexpr int parts_of(int tiles, int ctas, int steps) {
  // What storing a part's sums takes, and adding one part's, in steps of the kernel (0.75 us).
  constexpr int kStore = 6, kAdd = 2;
  int best = 1, best_cost = steps;
  for (int parts = 2; parts <= kMaxParts; ++parts) {
    const int part = (steps + parts - 1) / parts;
    const int rounds = (tiles * parts + ctas - 1) / ctas;
    if (rounds > kMaxPartRounds) break;
    if ((parts - 1) * part >= steps) continue;  // the last part would be empty
    const int cost = rounds * (part + kStore) + parts * kAdd;
    if (cost < best_cost) {
      best = parts;
      best_cost = cost;
    }
  }
  return best;
}

struct Work {
  int tile;
  int begin, end;  // steps
  int part, parts;
  int split_tile, split_tiles;  // which of the tiles that are split, and how many there are
};

class Schedule {
 public:
  BLOCK_SPARSE_HOST_DEVICE constexpr Schedule(int tiles, int ctas, int steps, int cta)
      : ctas_(ctas), steps_(steps), cta_(cta), split_(tiles % ctas), whole_(tiles - split_) {
    parts_ = parts_of(split_, ctas, steps);
  }

  // The i-th piece of work of this CTA; false where there is none.
  BLOCK_SPARSE_HOST_DEVICE constexpr bool get(int i, Work& work) const {
    const int64_t index = cta_ + int64_t{i} * ctas_;
    if (index < whole_) {
      work = {static_cast<int>(index), 0, steps_, 0, 1, 0, 0};
      return true;
    }
    const int64_t piece = index - whole_;
    if (piece >= int64_t{split_} * parts_) return false;
    const int tile = static_cast<int>(piece % split_), part = static_cast<int>(piece / split_);
    const int size = (steps_ + parts_ - 1) / parts_;
    const int end = part + 1 == parts_ ? steps_ : (part + 1) * size;
    work = {whole_ + tile, part * size, end, part, parts_, tile, split_};
    return true;
  }

 private:
  int ctas_, steps_, cta_;
  int split_, whole_;
  int parts_ = 1;
};

}  // namespace block_sparse::cuda::sm90
