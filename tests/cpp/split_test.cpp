// How the strip kernel's work is cut, without a GPU: every stage of every tile is done once, parts
// are even, and tiles are split where it pays and only there.
#include "cuda/sm90/split.h"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "cuda/skinny/plan.h"

namespace block_sparse::cuda::sm90::strips {
namespace {

constexpr int kClusters = 66;  // of an H100

constexpr Cost cost_of(int stages) {
  return {.stages = stages, .stage = 0.4, .start = 1, .join = 2.5, .add = 0.1};
}

Split split_of(int tiles, int stages) {
  return strips::split_of(tiles, cost_of(stages), kClusters, 1 << 20);
}

ProductDesc product(Product product, int64_t tokens, int64_t out, int64_t in, int64_t side) {
  ProductDesc desc;
  desc.product = product;
  desc.dtype = Dtype::bf16;
  desc.tokens = tokens;
  desc.out_features = out;
  desc.in_features = in;
  desc.block = {side, side};
  desc.nnz = (out / side) * (in / side) / 4;
  return desc;
}

TEST(Split, EveryStageOfEveryTileIsInOnePart) {
  for (const Split split : {Split{7, 0, 1}, Split{7, 7, 3}, Split{9, 4, 2}, Split{1, 1, 16}}) {
    for (const int stages : {0, 1, 5, 16, 224}) {
      std::map<int, std::vector<int>> done;
      std::map<int, int> pieces;
      for (int i = 0; i < split.tasks(); ++i) {
        const Task task(split, i);
        ASSERT_GE(task.tile, 0);
        ASSERT_LT(task.tile, split.tiles);
        ASSERT_EQ(task.parts, task.tile < split.whole() ? 1 : split.parts);
        if (task.parts > 1) {
          ASSERT_EQ(task.piece, task.part * split.last + task.tile - split.whole());
          ++pieces[task.piece];
        } else {
          ASSERT_EQ(task.piece, -1);
        }
        const int count = task.stage_count(stages);
        EXPECT_GE(count, stages / task.parts) << "parts are even";
        EXPECT_LE(count, (stages + task.parts - 1) / task.parts);
        std::vector<int>& of_tile = done[task.tile];
        of_tile.resize(stages);
        for (int s = 0; s < count; ++s) ++of_tile.at(task.first_stage(stages) + s);
      }
      EXPECT_EQ(done.size(), split.tiles);
      for (const auto& [tile, times] : done) {
        for (const int n : times) ASSERT_EQ(n, 1) << tile;
      }
      EXPECT_EQ(pieces.size(), split.pieces());
      for (const auto& [piece, times] : pieces) {
        EXPECT_LT(piece, split.pieces());
        EXPECT_EQ(times, 1);
      }
    }
  }
}

TEST(Split, ShortTilesAreNot) {
  for (int tiles = 1; tiles <= 3 * kClusters; ++tiles) {
    for (const int stages : {0, 1, 2, 3, 8}) EXPECT_EQ(split_of(tiles, stages).last, 0);
  }
}

TEST(Split, FewLongTilesAre) {
  for (const int tiles : {1, 8, 16, 32}) {
    const Split split = split_of(tiles, 224);
    EXPECT_EQ(split.last, tiles);
    EXPECT_GE(split.parts, 2);
    EXPECT_LE(split.parts, kMaxParts);
  }
}

TEST(Split, TilesThatFillTheRoundsAreNot) {
  for (int rounds = 1; rounds <= 20; ++rounds) {
    EXPECT_EQ(split_of(rounds * kClusters, 224).last, 0);
  }
}

TEST(Split, OnlyTheLastTilesOfMany) {
  for (int tiles = kClusters + 1; tiles <= 10 * kClusters; ++tiles) {
    EXPECT_LT(split_of(tiles, 224).last, 2 * kClusters);
  }
}

TEST(Split, IsNeverCostedSlowerThanNone) {
  for (const int stages : {1, 2, 16, 64, 224, 1000}) {
    const Cost cost = cost_of(stages);
    for (int tiles = 1; tiles <= 5 * kClusters; ++tiles) {
      EXPECT_LE(time_of(split_of(tiles, stages), cost, kClusters),
                time_of({tiles, 0, 1}, cost, kClusters));
    }
  }
}

TEST(Split, HasNoMorePiecesThanAreAllowed) {
  for (int most = 0; most <= 100; ++most) {
    EXPECT_LE(strips::split_of(10, cost_of(224), kClusters, most).pieces(), most);
  }
}

TEST(Plan, CoversAllTokensEvenly) {
  for (int64_t tokens = 1; tokens <= 2100; ++tokens) {
    const Plan plan = plan_of(product(Product::forward, tokens, 1024, 1024, 32), kClusters);
    EXPECT_EQ(plan.tile_tokens % 16, 0);
    EXPECT_LE(plan.tile_tokens, kWide.tokens);
    EXPECT_GE(plan.token_tiles * plan.tile_tokens, tokens);
    EXPECT_LT((plan.token_tiles - 1) * plan.tile_tokens, tokens);
  }
}

TEST(Plan, ThousandsOfTokensHaveWholeTilesOfTheLargestSize) {
  for (const Product which : {Product::forward, Product::grad_input}) {
    for (const int64_t side : {16, 32}) {
      const Plan plan = plan_of(product(which, 8192, 14336, 4096, side), kClusters);
      EXPECT_GT(plan.tile_tokens, kFew.tokens);
      EXPECT_TRUE(side == 16 || !plan.flexible());
    }
  }
}

TEST(Plan, FewOutputsAreSplit) {
  for (const int64_t side : {16, 32}) {
    const Plan plan = plan_of(product(Product::grad_input, 256, 14336, 4096, side), kClusters);
    EXPECT_GT(plan.split.parts, 1);
    EXPECT_GT(plan.workspace(), 0);
  }
}

TEST(Plan, ALittleMoreThanFullRoundsIsWholeTilesAndPartsOfTheRest) {
  for (const int64_t side : {16, 32}) {
    const Plan plan = plan_of(product(Product::forward, 1000, 6144, 4096, side), kClusters);
    EXPECT_GE(plan.split.whole(), kClusters);
    EXPECT_GT(plan.split.last, 0);
    EXPECT_GT(plan.split.parts, 1);
  }
}

// Three passes over W take longer than split sums, and less than tiles that are not split.
TEST(FewTokens, AreComparedWithSplitSumsWhereTheseRun) {
  ProductDesc desc = product(Product::forward, 130, 128, 32768, 32);
  desc.planned = true;
  desc.nnz = 4 * 1024 * 3 / 10;
  const skinny::Plan plan = skinny::plan_of(desc, 1);
  EXPECT_FALSE(skinny::is_fastest(desc, plan, 132, true));
  EXPECT_TRUE(skinny::is_fastest(desc, plan, 132, false));
}

// Every strip of a block belongs to one CTA of each team, and a multiprocessor has one CTA.
TEST(FewTokens, TeamsOfCtasHaveAllStrips) {
  for (const Product side : {Product::forward, Product::grad_input}) {
    for (const int64_t block : {16, 32, 48, 64, 96, 112, 128, 256}) {
      for (const int64_t tokens : {1, 16, 32, 64}) {
        for (const int multiprocessors : {1, 7, 108, 132}) {
          const skinny::Plan plan =
              skinny::plan_of(product(side, tokens, 14336, 4096, block), multiprocessors);
          EXPECT_EQ(plan.team_ctas * plan.strips_per_cta * plan.unit_outputs, block);
          EXPECT_LE(plan.ctas(), multiprocessors);
          EXPECT_EQ(plan.teams > 0, plan.warps_per_strip > 0);
        }
      }
    }
  }
}

}  // namespace
}  // namespace block_sparse::cuda::sm90::strips
