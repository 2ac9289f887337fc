// wgmma with a strip that may be absent: 64 tokens of x in registers, 32 outputs of W in shared
// memory. The test, the products and the step to the next strip are one piece of assembly, so that
// for the compiler the sums are always updated: with an `if` around CuTe's instruction it copies
// accumulators where the paths meet, and then ptxas serialises the products (C7515) after minutes
// of thought. This way the position in the ring of W also stays in a uniform register.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::sm90::strips {

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
#define BLOCK_SPARSE_SUMS                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define BLOCK_SPARSE_SUM_OPERANDS(s)                                                           \
  "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]),          \
  "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]),      \
  "+f"(s[14]), "+f"(s[15])
#define BLOCK_SPARSE_FRAGMENT_OPERANDS(x) "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
// Fence and commit stand in the branch, or ptxas serialises (C7520).
#define BLOCK_SPARSE_IF_PRESENT                                                                \
  "{\n.reg .pred absent, on, over;\n.reg .b32 bit, low;\n.reg .b64 w;\n"                       \
  "and.b32 bit, %17, %18;\nsetp.eq.u32 absent, bit, 0;\nsetp.eq.u32 on, 0, 0;\n"               \
  "@absent bra next;\n"                                                                        \
  "wgmma.fence.sync.aligned;\n"
#define BLOCK_SPARSE_WGMMA(type, fragment)                                                     \
  "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " " BLOCK_SPARSE_SUMS ", "       \
  fragment ", w, on, 1, 1, %23;\n"
#define BLOCK_SPARSE_NEXT                                                                      \
  "wgmma.commit_group.sync.aligned;\n"                                                         \
  "add.u32 %16, %16, %22;\nsetp.eq.u32 over, %16, %20;\n@over mov.u32 %16, %19;\n"             \
  "next:\n}"
#define BLOCK_SPARSE_ONE_STEP(type)                                                            \
  BLOCK_SPARSE_IF_PRESENT                                                                      \
  "mov.b64 w, {%16, %21};\n" BLOCK_SPARSE_WGMMA(type, "{%24, %25, %26, %27}")                  \
  BLOCK_SPARSE_NEXT
#define BLOCK_SPARSE_TWO_STEPS(type)                                                           \
  BLOCK_SPARSE_IF_PRESENT                                                                      \
  "mov.b64 w, {%16, %21};\n" BLOCK_SPARSE_WGMMA(type, "{%24, %25, %26, %27}")                  \
  "add.u32 low, %16, %32;\nmov.b64 w, {low, %21};\n"                                           \
  BLOCK_SPARSE_WGMMA(type, "{%28, %29, %30, %31}")                                             \
  BLOCK_SPARSE_NEXT
// clang-format on

// Layout: kHigh, the high word of a descriptor; kStep and kStrip, from one step of the depth and
// from one strip to the next, in units of the low word; kTransposed.
template <Dtype kDtype, class Layout, uint32_t kBit>
__device__ inline void multiply_if_present(uint32_t present, Sums& sums, const Fragment& x,
                                           StripRing& ring) {
#define BLOCK_SPARSE_OPERANDS             \
  BLOCK_SPARSE_SUM_OPERANDS(sums),        \
      "+r"(ring.next)                     \
      : "r"(present),                     \
        "n"(kBit),                        \
        "r"(ring.begin),                  \
        "r"(ring.end),                    \
        "n"(Layout::kHigh),               \
        "n"(Layout::kStrip),              \
        "n"(Layout::kTransposed ? 1 : 0), \
        BLOCK_SPARSE_FRAGMENT_OPERANDS(x)
  if constexpr (kDtype == Dtype::bf16) {
    asm volatile(BLOCK_SPARSE_ONE_STEP("bf16") : BLOCK_SPARSE_OPERANDS : "memory");
  } else {
    asm volatile(BLOCK_SPARSE_ONE_STEP("f16") : BLOCK_SPARSE_OPERANDS : "memory");
  }
}

template <Dtype kDtype, class Layout, uint32_t kBit>
__device__ inline void multiply_if_present(uint32_t present, Sums& sums, const Fragment& x,
                                           const Fragment& x1, StripRing& ring) {
#define BLOCK_SPARSE_OPERANDS_OF_TWO \
  BLOCK_SPARSE_OPERANDS, BLOCK_SPARSE_FRAGMENT_OPERANDS(x1), "n"(Layout::kStep)
  if constexpr (kDtype == Dtype::bf16) {
    asm volatile(BLOCK_SPARSE_TWO_STEPS("bf16") : BLOCK_SPARSE_OPERANDS_OF_TWO : "memory");
  } else {
    asm volatile(BLOCK_SPARSE_TWO_STEPS("f16") : BLOCK_SPARSE_OPERANDS_OF_TWO : "memory");
  }
}

#undef BLOCK_SPARSE_SUMS
#undef BLOCK_SPARSE_SUM_OPERANDS
#undef BLOCK_SPARSE_FRAGMENT_OPERANDS
#undef BLOCK_SPARSE_IF_PRESENT
#undef BLOCK_SPARSE_WGMMA
#undef BLOCK_SPARSE_NEXT
#undef BLOCK_SPARSE_ONE_STEP
#undef BLOCK_SPARSE_TWO_STEPS
#undef BLOCK_SPARSE_OPERANDS
#undef BLOCK_SPARSE_OPERANDS_OF_TWO

}  // namespace block_sparse::cuda::sm90::strips
