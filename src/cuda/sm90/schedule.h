// Which CTA of the sampled product takes which tile, or which slice of it, and which of its tokens.
// All slices cost the same, so they are dealt in turn: CTAs stay at the same tokens and find dy and
// x in the L2 cache. Slices that are too few for one more round may be split along the tokens.
#pragma once

#include <cstdint>
#include <limits>

#include "block_sparse/host_device.h"

namespace block_sparse::cuda::sm90 {

constexpr int kStepTokens = 64;  // what a stage of the kernel holds
constexpr int kMaxParts = 16;
constexpr int kMaxPartRounds = 2;
// A tile's columns may be shared out in slices, where tiles are few.
constexpr int kMaxSlices = 4;

// In units of 0.05 us, fitted to what was measured on an H100: a step, the store of a part's sums,
// the sum of one more part. A narrow slice loads as much of dy as a whole tile, hence the steps.
struct SliceCost {
  int step, store, add;
};
BLOCK_SPARSE_HOST_DEVICE constexpr SliceCost slice_cost(int slices) {
  if (slices == 1) return {17, 115, 30};
  return slices == 2 ? SliceCost{10, 60, 14} : SliceCost{8, 28, 6};
}

constexpr int kNever = std::numeric_limits<int>::max();

// What it takes to split `items`, which are less than a round, in so many parts each.
BLOCK_SPARSE_HOST_DEVICE constexpr int cost_of_parts(SliceCost cost, int parts, int items, int ctas,
                                                     int steps) {
  if (parts == 1) return steps * cost.step;
  const int part = (steps + parts - 1) / parts;
  const int rounds = (items * parts + ctas - 1) / ctas;
  if (rounds > kMaxPartRounds) return kNever;
  if ((parts - 1) * part >= steps) return kNever;  // the last part would be empty
  return rounds * (part * cost.step + cost.store) + parts * cost.add;
}

struct Parts {
  int count, cost;
};
BLOCK_SPARSE_HOST_DEVICE constexpr Parts best_parts(SliceCost cost, int items, int ctas,
                                                    int steps) {
  Parts best{1, cost_of_parts(cost, 1, items, ctas, steps)};
  for (int parts = 2; parts <= kMaxParts; ++parts) {
    const int other = cost_of_parts(cost, parts, items, ctas, steps);
    if (other < best.cost) best = {parts, other};
  }
  return best;
}

// In how many slices tiles are best shared out.
constexpr int best_slices(int64_t tiles, int ctas, int steps) {
  int best = 1;
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int slices = 1; slices <= kMaxSlices; slices *= 2) {
    const SliceCost cost = slice_cost(slices);
    const int64_t items = tiles * slices;
    const int left = static_cast<int>(items % ctas);
    const int64_t whole = items / ctas * (int64_t{steps} * cost.step + cost.store / 2);
    const int64_t all = whole + (left > 0 ? best_parts(cost, left, ctas, steps).cost : 0);
    if (all < best_cost) {
      best = slices;
      best_cost = all;
    }
  }
  return best;
}

struct Work {
  int tile, slice;
  int begin, end;  // steps
  int part, parts;
  int split_item, split_items;  // which of those that are split, and how many there are
};

class Schedule {
 public:
  BLOCK_SPARSE_HOST_DEVICE constexpr Schedule(int tiles, int slices, int ctas, int steps, int cta)
      : slices_(slices),
        ctas_(ctas),
        steps_(steps),
        cta_(cta),
        split_(static_cast<int>(int64_t{tiles} * slices % ctas)),
        whole_(int64_t{tiles} * slices - split_),
        parts_(best_parts(slice_cost(slices), split_, ctas, steps).count) {}

  // The i-th piece of work of this CTA; false where there is none.
  BLOCK_SPARSE_HOST_DEVICE constexpr bool get(int i, Work& work) const {
    const int64_t index = cta_ + int64_t{i} * ctas_;
    if (index < whole_) {
      work = item(index);
      work.end = steps_;
      work.parts = 1;
      return true;
    }
    const int64_t piece = index - whole_;
    if (piece >= int64_t{split_} * parts_) return false;
    const int split = static_cast<int>(piece % split_), part = static_cast<int>(piece / split_);
    const int size = (steps_ + parts_ - 1) / parts_;
    work = item(whole_ + split);
    work.begin = part * size;
    work.end = part + 1 == parts_ ? steps_ : work.begin + size;
    work.part = part;
    work.parts = parts_;
    work.split_item = split;
    work.split_items = split_;
    return true;
  }

 private:
  BLOCK_SPARSE_HOST_DEVICE constexpr Work item(int64_t index) const {
    Work work{};
    work.tile = static_cast<int>(index / slices_);
    work.slice = static_cast<int>(index % slices_);
    return work;
  }

  int slices_, ctas_, steps_, cta_;
  int split_;
  int64_t whole_;
  int parts_;
};

}  // namespace block_sparse::cuda::sm90
