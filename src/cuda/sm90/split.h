// How the strip kernel's product is cut for a GPU: how many tokens a tile has, and which tiles are
// split along the sum, so that few tiles keep all of the chip busy. A cost decides, of a few rates
// that were measured on an H100 (docs/notebook.md). No device code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "block_sparse/product.h"
#include "cuda/sm90/strip_walk.h"

namespace block_sparse::cuda::sm90::strips {

constexpr int kMaxParts = 16;

// What the clusters of a launch do, one after the other: tiles (of a cluster), the last ones of
// which in parts. Each part is a share of the stages, and its sums are stored for another kernel to
// add up, in their order.
struct Split {
  int tiles;
  int last;   // of them are split
  int parts;  // of each of these

  BLOCK_SPARSE_HOST_DEVICE constexpr int whole() const { return tiles - last; }
  BLOCK_SPARSE_HOST_DEVICE constexpr int pieces() const { return last * parts; }
  BLOCK_SPARSE_HOST_DEVICE constexpr int tasks() const { return whole() + pieces(); }
};

struct Task {
  int tile;
  int piece;  // where its sums go, among those of all parts; -1: it is a whole tile
  int part, parts;

  // A tile, whole.
  BLOCK_SPARSE_HOST_DEVICE explicit constexpr Task(int tile)
      : tile(tile), piece(-1), part(0), parts(1) {}

  // Parts that are worked on together are the same of neighbouring tiles, which share x and W.
  BLOCK_SPARSE_HOST_DEVICE constexpr Task(const Split& split, int task)
      : tile(task), piece(task - split.whole()), part(0), parts(1) {
    if (piece < 0) {
      piece = -1;
      return;
    }
    part = piece / split.last;
    parts = split.parts;
    tile = split.whole() + piece % split.last;
  }

  // The first of its stages, and how many it has. Of a whole tile, nobody waits for `stages` to
  // know where it begins.
  BLOCK_SPARSE_HOST_DEVICE constexpr int first_stage(int stages) const {
    return part == 0 ? 0 : stages * part / parts;
  }
  BLOCK_SPARSE_HOST_DEVICE constexpr int stage_count(int stages) const {
    const int end = part + 1 == parts ? stages : stages * (part + 1) / parts;
    return end - first_stage(stages);
  }
};
static_assert(kMaxStages * kMaxParts <= std::numeric_limits<int32_t>::max());

// Microseconds.
struct Cost {
  int stages;    // of a tile
  double stage;  // each
  double start;  // of a tile or a part, until its first stage is there
  double join;   // starting to add parts up
  double add;    // of each part: its sums are written and read again
};

constexpr double time_of(const Split& split, const Cost& cost, int clusters) {
  const auto rounds = [&](int tasks) { return (tasks + clusters - 1) / clusters; };
  const int whole = rounds(split.whole()), parts = rounds(split.tasks()) - whole;
  const int part_stages = (cost.stages + split.parts - 1) / split.parts;
  double time = whole * (cost.start + cost.stages * cost.stage) +
                parts * (cost.start + part_stages * cost.stage);
  if (split.last > 0) time += cost.join + split.pieces() * cost.add;
  return time;
}

// The split that is done first. As long as tiles fill rounds they are whole, except those of the
// last full round, which may be needed to make the parts of the rest even.
constexpr Split split_of(int tiles, const Cost& cost, int clusters, int max_pieces) {
  constexpr int kLeastStages = 2;  // of a part
  Split best{tiles, 0, 1};
  double least = time_of(best, cost, clusters);
  const int full = tiles / clusters;
  for (int rounds = std::max(full - 1, 0); rounds <= full; ++rounds) {
    Split split{tiles, tiles - rounds * clusters, 2};
    const int most = std::min(kMaxParts, cost.stages / kLeastStages);
    for (; split.parts <= most && split.pieces() <= max_pieces; ++split.parts) {
      const double time = time_of(split, cost, clusters);
      if (split.last == 0 || time >= least) continue;
      best = split;
      least = time;
    }
  }
  return best;
}

struct Plan {
  Tile tile;
  int tile_tokens;  // a multiple of 16, no more than it has room for
  int token_tiles;
  Split split;
  double time;         // microseconds
  int64_t part_bytes;  // of the sums of a part
  int64_t workspace() const { return split.pieces() * part_bytes; }
  bool flexible() const { return split.last > 0 || tile_tokens < tile.tokens; }
};

// Microseconds of a stage of 64 of the depth, and what is added for each token of the tile.
struct StageCost {
  double base, token;
};
constexpr StageCost stage_cost(const Tile& tile) {
  if (tile == kTall) return {.base = 0.52, .token = 0.0002};
  if (tile == kFew) return {.base = 0.25, .token = 0.00125};
  return {.base = 0.43, .token = 0.00015};
}

inline Plan plan_with(const Tile& tile, const ProductDesc& desc, const Lines& lines, int clusters) {
  constexpr double kLaunch = 5.5;
  constexpr int64_t kMostBytes = 48 << 20;  // of parts: what L2 holds
  const auto ceil = [](int64_t count, int64_t by) { return (count + by - 1) / by; };
  Plan plan{};
  plan.tile = tile;
  plan.token_tiles = static_cast<int>(ceil(desc.tokens, tile.tokens));
  plan.tile_tokens = static_cast<int>(ceil(ceil(desc.tokens, plan.token_tiles), 16) * 16);
  plan.part_bytes = int64_t{kCluster} * tile.outputs() * plan.tile_tokens * 4;
  const StageCost stage = stage_cost(tile);
  const Cost cost{.stages = static_cast<int>(lines.stages()),
                  .stage = stage.base + plan.tile_tokens * stage.token,
                  .start = 1,
                  .join = 2.5,
                  .add = static_cast<double>(plan.part_bytes) / 1.8e6};
  const auto tiles = static_cast<int>(lines.panels() / kCluster * plan.token_tiles);
  plan.split = split_of(tiles, cost, clusters, static_cast<int>(kMostBytes / plan.part_bytes));
  plan.time = kLaunch + time_of(plan.split, cost, clusters);
  return plan;
}

// Of at least one token. `clusters`: that run at once.
inline Plan plan_of(const ProductDesc& desc, int clusters) {
  const Lines lines = lines_of(desc.grid(), desc.block, desc.product == Product::grad_input);
  const Plan plan = plan_with(lines.tile(), desc, lines, clusters);
  if (lines.tile() != kWide) return plan;
  const Plan few = plan_with(kFew, desc, lines, clusters);
  return few.time < plan.time ? few : plan;
}

}  // namespace block_sparse::cuda::sm90::strips
