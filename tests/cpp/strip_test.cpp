// What the strip kernel's walk counts, without a GPU.
#include <gtest/gtest.h>

#include "cuda/sm90/strip_config.h"

namespace block_sparse::cuda::sm90::strips {
namespace {

TEST(EarlyPieces, OverwriteNothingThatIsHeld) {
  constexpr int kRing = 45;
  for (int held = 0; held < 4; ++held) {
    for (int first = held; first < held + 2 * kRing; ++first) {
      for (int count = 0; count <= 16; ++count) {
        const int early = early_pieces(first, first + count, held, kRing);
        ASSERT_GE(early, 0);
        ASSERT_LE(early, count);
        // A piece goes where the one lies that was loaded a whole ring before it.
        if (early > 0) {
          EXPECT_LT(first + early - 1 - kRing, held);
        }
        if (early < count) {
          EXPECT_GE(first + early - kRing, held) << "could be early too";
        }
      }
    }
  }
}

// The last stage of an odd number of columns: 8 pieces after stages of 16. Read as "all of them", a
// negative count overwrote pieces 83 to 90 while they were read.
TEST(EarlyPieces, AShortStageAfterFullOnes) { EXPECT_EQ(early_pieces(128, 136, 80, 45), 0); }

}  // namespace
}  // namespace block_sparse::cuda::sm90::strips
