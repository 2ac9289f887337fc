// How the sampled product's work is cut, without a GPU: every step of every slice of every tile is
// done once, split or not, and tiles are sliced where they are few.
#include "cuda/sm90/schedule.h"

#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

namespace block_sparse::cuda::sm90 {
namespace {

constexpr int kCtas = 132;  // of an H100

TEST(Schedule, EveryStepOfEverySliceIsDoneOnce) {
  for (const int tiles : {0, 1, 5, 20, 66, 131, 132, 133, 500}) {
    for (int slices = 1; slices <= kMaxSlices; slices *= 2) {
      for (const int steps : {1, 2, 7, 32, 128}) {
        std::map<std::pair<int, int>, std::vector<int>> done;
        std::map<std::pair<int, int>, std::pair<int, int>> places;  // of the sums of parts
        for (int cta = 0; cta < kCtas; ++cta) {
          const Schedule schedule(tiles, slices, kCtas, steps, cta);
          Work work;
          for (int i = 0; schedule.get(i, work); ++i) {
            ASSERT_LT(work.tile, tiles);
            ASSERT_LT(work.slice, slices);
            ASSERT_LT(work.begin, work.end) << "nothing is loaded, so nothing would arrive";
            std::vector<int>& steps_done = done[{work.tile, work.slice}];
            steps_done.resize(steps);
            for (int s = work.begin; s < work.end; ++s) ++steps_done.at(s);
            ASSERT_LT(work.part, work.parts);
            if (work.parts == 1) continue;
            ASSERT_LE(work.parts, kMaxParts);
            ASSERT_LT(work.split_item, work.split_items);
            EXPECT_LT(work.split_items, kCtas);
            EXPECT_LE(work.split_items * work.parts, kMaxPartRounds * kCtas);
            const bool is_new =
                places.insert({{work.part, work.split_item}, {work.tile, work.slice}}).second;
            EXPECT_TRUE(is_new) << "two parts in one place";
          }
        }
        ASSERT_EQ(done.size(), tiles * slices);
        for (const auto& [item, steps_done] : done) {
          EXPECT_EQ(steps_done, std::vector<int>(steps, 1));
        }
      }
    }
  }
}

TEST(Schedule, TilesAreSlicedWhereTheyAreFew) {
  EXPECT_EQ(best_slices(5, kCtas, 32), kMaxSlices);
  EXPECT_EQ(best_slices(35, kCtas, 32), 2);
  EXPECT_EQ(best_slices(500, kCtas, 128), 1);
}

}  // namespace
}  // namespace block_sparse::cuda::sm90
