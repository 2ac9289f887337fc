// The instructions of Ampere and later that the few-token kernels use: an asynchronous copy and the
// small matrix product.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"
#include "cuda/overlap.cuh"
#include "cuda/ptx.cuh"

namespace block_sparse::cuda::skinny::ptx {

using namespace cuda::ptx;

// A copy that arrives some time later. Past the first cache: what is read once.
__device__ inline void copy_16_bytes(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// The same, or sixteen bytes of zero; the address has to be a valid one.
__device__ inline void copy_16_bytes_or_zero(uint32_t shared, const void* global, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(copy ? 16 : 0)
               : "memory");
}

// Until at most so many of the groups that this thread committed are under way; up to 6.
__device__ __forceinline__ void wait_for_copies(int pending) {
  using cuda::ptx::wait_for_copies;
  if (pending >= 3) {
    if (pending == 3) return wait_for_copies<3>();
    if (pending == 4) return wait_for_copies<4>();
    return wait_for_copies<5>();
  }
  if (pending == 2) return wait_for_copies<2>();
  if (pending == 1) return wait_for_copies<1>();
  wait_for_copies<0>();
}

// What is to stay in a register: the compiler would compute it anew in every iteration.
template <class T>
__device__ __forceinline__ T kept(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

// A barrier of so many threads, whole warps; number 0 is that of all.
__device__ inline void sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Asks for bytes to be brought to L2, in multiples of 16. From Hopper on; elsewhere nothing happens.
__device__ inline void prefetch([[maybe_unused]] const void* global, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// sums[16 x 8] += a[16 x 16] b[16 x 8]
template <class T>
__device__ inline void multiply(float4& sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (Traits<T>::dtype == Dtype::bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums.x), "+f"(sums.y), "+f"(sums.z), "+f"(sums.w)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(Traits<T>::dtype == Dtype::f16);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
        " {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums.x), "+f"(sums.y), "+f"(sums.z), "+f"(sums.w)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace block_sparse::cuda::skinny::ptx
