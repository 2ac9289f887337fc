// The instructions of Ampere and later that the few-token kernels use: an asynchronous copy, the
// small matrix product, and 16 bytes from CTA to CTA.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"
#include "cuda/overlap.cuh"
#include "cuda/ptx.cuh"
#include "cuda/skinny/params.h"

namespace block_sparse::cuda::skinny::ptx {

using namespace cuda::ptx;

// A copy that arrives some time later. Past the first cache: what is read once.
__device__ inline void copy_16_bytes(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Asks for bytes to be brought to L2, in multiples of 16. From Hopper on; elsewhere nothing
// happens.
__device__ inline void prefetch([[maybe_unused]] const void* global, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// 16 bytes that other CTAs see as a whole or not at all, and that the first cache has no part in.
__device__ inline void store(Part* to, Part part) {
  const auto sums = static_cast<uint64_t>(__float_as_uint(part.y)) << 32 | __float_as_uint(part.x);
  asm volatile(
      "{\n.reg .b128 part;\n"
      "mov.b128 part, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], part;\n}"
      :
      : "l"(to), "l"(sums), "l"(part.tag)
      : "memory");
}
__device__ inline Part load(const Part* from) {
  uint64_t sums, tag;
  asm volatile(
      "{\n.reg .b128 part;\n"
      "ld.relaxed.gpu.global.b128 part, [%2];\n"
      "mov.b128 {%0, %1}, part;\n}"
      : "=l"(sums), "=l"(tag)
      : "l"(from)
      : "memory");
  return {__uint_as_float(static_cast<uint32_t>(sums)),
          __uint_as_float(static_cast<uint32_t>(sums >> 32)), tag};
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
