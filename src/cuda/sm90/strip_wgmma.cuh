// wgmma with the strips of W that are present: 64 tokens of x in registers, 32 outputs of W in
// shared memory for each strip. The tests, the products and the steps from strip to strip are one
// piece of assembly: with an `if` around CuTe's instruction the compiler copies accumulators where
// the paths meet, and ptxas then serialises the products (C7515). All tests stand before the first
// product, so that an absent strip costs a branch and no wait for its predicate.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::sm90::strips {

// What the assembly below is written for.
constexpr int kTileStrips = 11;

// 64 tokens x 32 outputs of one thread's warpgroup: element 4 j + 2 h + e is token
// 16 warp + lane / 4 + 8 h and output 8 j + 2 (lane % 4) + e.
using Sums = float[16];
// 64 tokens x 16 of the depth.
using Fragment = uint32_t[4];

// The ring of W as descriptors have it: the low words of the next strip, the first one, and the
// end.
struct StripRing {
  uint32_t next;
  uint32_t begin;
  uint32_t end;
};

// clang-format off
#define BLOCK_SPARSE_SUMS_0 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define BLOCK_SPARSE_SUMS_1 "{%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define BLOCK_SPARSE_SUMS_2 "{%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}"
#define BLOCK_SPARSE_SUMS_3 "{%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define BLOCK_SPARSE_SUMS_4 "{%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}"
#define BLOCK_SPARSE_SUMS_5 "{%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"
#define BLOCK_SPARSE_SUMS_6 "{%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111}"
#define BLOCK_SPARSE_SUMS_7 "{%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define BLOCK_SPARSE_SUMS_8 "{%128, %129, %130, %131, %132, %133, %134, %135, %136, %137, %138, %139, %140, %141, %142, %143}"
#define BLOCK_SPARSE_SUMS_9 "{%144, %145, %146, %147, %148, %149, %150, %151, %152, %153, %154, %155, %156, %157, %158, %159}"
#define BLOCK_SPARSE_SUMS_10 "{%160, %161, %162, %163, %164, %165, %166, %167, %168, %169, %170, %171, %172, %173, %174, %175}"
#define BLOCK_SPARSE_SUM_OPERANDS(s)                                                           \
  "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]),          \
  "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]),      \
  "+f"(s[14]), "+f"(s[15])
#define BLOCK_SPARSE_FRAGMENT_OPERANDS(x) "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
// %176 next, %177 present, %178 begin, %179 end, %180 high word, %181 strip, %182 transposed,
// %183 rows per strip, %184-187 first fragment, %188-191 second, %192 step.
#define BLOCK_SPARSE_TEST(s)                                                                   \
  "and.b32 bit, %177, (1 << (" #s " * %183));\nsetp.eq.u32 absent" #s ", bit, 0;\n"
#define BLOCK_SPARSE_WGMMA(type, s, fragment)                                                  \
  "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " BLOCK_SPARSE_SUMS_##s ", "   \
  fragment ", w, on, 1, 1, %182;\n"
#define BLOCK_SPARSE_ONE_STEP(type, s)                                                         \
  "mov.b64 w, {%176, %180};\n" BLOCK_SPARSE_WGMMA(type, s, "{%184, %185, %186, %187}")
#define BLOCK_SPARSE_TWO_STEPS(type, s)                                                        \
  BLOCK_SPARSE_ONE_STEP(type, s)                                                               \
  "add.u32 low, %176, %192;\nmov.b64 w, {low, %180};\n"                                        \
  BLOCK_SPARSE_WGMMA(type, s, "{%188, %189, %190, %191}")
// Fence and commit stand in the branch, or ptxas serialises (C7520).
#define BLOCK_SPARSE_STRIP(steps, type, s)                                                     \
  "@absent" #s " bra next" #s ";\nwgmma.fence.sync.aligned;\n" steps(type, s)                  \
  "wgmma.commit_group.sync.aligned;\nadd.u32 %176, %176, %181;\n"                              \
  "setp.eq.u32 over, %176, %179;\n@over mov.u32 %176, %178;\nnext" #s ":\n"
#define BLOCK_SPARSE_STRIPS(steps, type)                                                       \
  "{\n.reg .pred absent<11>, on, over;\n.reg .b32 bit, low;\n.reg .b64 w;\n"                    \
  "setp.eq.u32 on, 0, 0;\n"                                                                    \
  BLOCK_SPARSE_TEST(0) BLOCK_SPARSE_TEST(1) BLOCK_SPARSE_TEST(2) BLOCK_SPARSE_TEST(3)          \
  BLOCK_SPARSE_TEST(4) BLOCK_SPARSE_TEST(5) BLOCK_SPARSE_TEST(6) BLOCK_SPARSE_TEST(7)          \
  BLOCK_SPARSE_TEST(8) BLOCK_SPARSE_TEST(9) BLOCK_SPARSE_TEST(10)                              \
  BLOCK_SPARSE_STRIP(steps, type, 0) BLOCK_SPARSE_STRIP(steps, type, 1)                        \
  BLOCK_SPARSE_STRIP(steps, type, 2) BLOCK_SPARSE_STRIP(steps, type, 3)                        \
  BLOCK_SPARSE_STRIP(steps, type, 4) BLOCK_SPARSE_STRIP(steps, type, 5)                        \
  BLOCK_SPARSE_STRIP(steps, type, 6) BLOCK_SPARSE_STRIP(steps, type, 7)                        \
  BLOCK_SPARSE_STRIP(steps, type, 8) BLOCK_SPARSE_STRIP(steps, type, 9)                        \
  BLOCK_SPARSE_STRIP(steps, type, 10) "}"
// clang-format on

// Adds the product of x and each strip of `present` to its sums. Where a piece is 32 deep, x1 has
// the second 16 of the depth; else it is not read.
// Layout: kHigh, the high word of a descriptor; kStep and kStrip, from one step of the depth and
// from one strip to the next, in units of the low word; kTransposed.
template <Dtype kDtype, class Layout, int kSteps, int kRowsPerStrip>
__device__ inline void multiply_present(uint32_t present, Sums (&sums)[kTileStrips],
                                        const Fragment& x, const Fragment& x1, StripRing& ring) {
#define BLOCK_SPARSE_OPERANDS                                                 \
  BLOCK_SPARSE_SUM_OPERANDS(sums[0]), BLOCK_SPARSE_SUM_OPERANDS(sums[1]),     \
      BLOCK_SPARSE_SUM_OPERANDS(sums[2]), BLOCK_SPARSE_SUM_OPERANDS(sums[3]), \
      BLOCK_SPARSE_SUM_OPERANDS(sums[4]), BLOCK_SPARSE_SUM_OPERANDS(sums[5]), \
      BLOCK_SPARSE_SUM_OPERANDS(sums[6]), BLOCK_SPARSE_SUM_OPERANDS(sums[7]), \
      BLOCK_SPARSE_SUM_OPERANDS(sums[8]), BLOCK_SPARSE_SUM_OPERANDS(sums[9]), \
      BLOCK_SPARSE_SUM_OPERANDS(sums[10]),                                    \
      "+r"(ring.next)                                                         \
      : "r"(present),                                                         \
        "r"(ring.begin),                                                      \
        "r"(ring.end),                                                        \
        "n"(Layout::kHigh),                                                   \
        "n"(Layout::kStrip),                                                  \
        "n"(Layout::kTransposed ? 1 : 0),                                     \
        "n"(kRowsPerStrip),                                                   \
        BLOCK_SPARSE_FRAGMENT_OPERANDS(x),                                    \
        BLOCK_SPARSE_FRAGMENT_OPERANDS(x1),                                   \
        "n"(Layout::kStep)
  if constexpr (kSteps == 1 && kDtype == Dtype::bf16) {
    asm volatile(BLOCK_SPARSE_STRIPS(BLOCK_SPARSE_ONE_STEP, "bf16")
                 : BLOCK_SPARSE_OPERANDS
                 : "memory");
  } else if constexpr (kSteps == 1) {
    asm volatile(BLOCK_SPARSE_STRIPS(BLOCK_SPARSE_ONE_STEP, "f16")
                 : BLOCK_SPARSE_OPERANDS
                 : "memory");
  } else if constexpr (kDtype == Dtype::bf16) {
    asm volatile(BLOCK_SPARSE_STRIPS(BLOCK_SPARSE_TWO_STEPS, "bf16")
                 : BLOCK_SPARSE_OPERANDS
                 : "memory");
  } else {
    asm volatile(BLOCK_SPARSE_STRIPS(BLOCK_SPARSE_TWO_STEPS, "f16")
                 : BLOCK_SPARSE_OPERANDS
                 : "memory");
  }
}

#undef BLOCK_SPARSE_SUM_OPERANDS
#undef BLOCK_SPARSE_FRAGMENT_OPERANDS
#undef BLOCK_SPARSE_TEST
#undef BLOCK_SPARSE_WGMMA
#undef BLOCK_SPARSE_ONE_STEP
#undef BLOCK_SPARSE_TWO_STEPS
#undef BLOCK_SPARSE_STRIP
#undef BLOCK_SPARSE_STRIPS
#undef BLOCK_SPARSE_OPERANDS

}  // namespace block_sparse::cuda::sm90::strips
