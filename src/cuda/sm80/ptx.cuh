// The instructions of Ampere that these kernels are made of: copies that arrive some time later,
// barriers in shared memory, and the tensor cores' product. No layouts and no policy.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"
#include "cuda/ptx.cuh"

namespace block_sparse::cuda::sm80::ptx {

using namespace cuda::ptx;

// 16 bytes to shared memory, or zeros: then nothing is read.
__device__ inline void copy(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Nothing at all where `wanted` is false; no branch.
__device__ inline void copy_if(bool wanted, uint32_t to, const void* from, bool inside) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.s32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
      "}" ::"r"(to),
      "l"(from), "r"(inside ? 16 : 0), "r"(int{wanted})
      : "memory");
}

// Two words of shared memory, which other threads write between barriers.

__device__ inline void store(uint32_t to, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}

__device__ inline uint2 load(uint32_t from) {
  uint2 words;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "r"(from)
               : "memory");
  return words;
}

// Barriers in shared memory. A wait names the parity of the phase that it waits for.

__device__ inline void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}

// Arrives when the copies that this thread began have landed.
__device__ inline void arrive_with_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900  // sleeps while it waits
#define BLOCK_SPARSE_TEST "mbarrier.try_wait.parity.shared.b64"
#else
#define BLOCK_SPARSE_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: " BLOCK_SPARSE_TEST
      " done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef BLOCK_SPARSE_TEST
}

// sums[16 x 8] += a[16 x 16] b[16 x 8], the two registers of b being b0 and b1.
template <class T>
__device__ inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define BLOCK_SPARSE_MULTIPLY(T, name)                                                      \
  template <>                                                                               \
  __device__ inline void multiply<T>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, \
                                     uint32_t b1) {                                         \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                              \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
  }
BLOCK_SPARSE_MULTIPLY(BFloat16, "bf16")
BLOCK_SPARSE_MULTIPLY(Float16, "f16")
#undef BLOCK_SPARSE_MULTIPLY

}  // namespace block_sparse::cuda::sm80::ptx
