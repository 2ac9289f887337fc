// float32 in f16, device code. An operand is multiplied by a power of two that puts its largest
// element just under 2^15, and rounded: f16 then keeps as many bits as TF32, 11, of all that are
// not 2^29 times smaller, and of those its error is 2^-40 of the largest. What is not finite stays
// so, and does not count for the largest.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace block_sparse::cuda::sm90 {

constexpr int kRoundThreads = 256;
constexpr int kRoundPieces = 4;  // of eight elements, of a thread at a time

// Lines of elements that lie side by side; of a contiguous matrix all are one. Everything begins
// at 16 bytes.
struct Operand {
  const float* from;
  uint16_t* to;  // contiguous
  int64_t lines;
  int64_t line_pieces;  // of eight elements
  int64_t stride;       // from line to line, in `from`
};

// The two operands of a product, the second in the second half of the grid.
struct Rounding {
  Operand operands[2];
  uint32_t* largest;  // [2], zero at first: the bits of the largest finite absolute value
  float* factors;     // [2]: sums times both are the sums of what was not scaled
};

// Calls f(line, piece) for what this CTA has to do.
template <class F>
__device__ __forceinline__ void for_each_piece(const Operand& operand, const F& f) {
  constexpr int kPieces = kRoundThreads * kRoundPieces;
  const int64_t parts = (operand.line_pieces + kPieces - 1) / kPieces;  // of a line
  for (int64_t part = blockIdx.x; part < operand.lines * parts; part += gridDim.x) {
    const int64_t line = part / parts, first = part % parts * kPieces + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kRoundPieces; ++i) {
      const int64_t piece = first + i * kRoundThreads;
      if (piece < operand.line_pieces) f(line, piece);
    }
  }
}

__device__ __forceinline__ const float4* piece_at(const Operand& operand, int64_t line,
                                                  int64_t piece) {
  return reinterpret_cast<const float4*>(operand.from + line * operand.stride) + piece * 2;
}

// Which is largest depends on no order.
static __global__ void __launch_bounds__(kRoundThreads)
    find_largest(const __grid_constant__ Rounding rounding) {
  const Operand& operand = rounding.operands[blockIdx.y];
  constexpr uint32_t kInfinity = 0x7f800000;
  uint32_t largest = 0;
  for_each_piece(operand, [&](int64_t line, int64_t piece) {
    const float4* from = piece_at(operand, line, piece);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = __ldg(from + i);
      for (const float element : {four.x, four.y, four.z, four.w}) {
        const uint32_t bits = __float_as_uint(element) & 0x7fffffff;
        if (bits < kInfinity) largest = max(largest, bits);
      }
    }
  });
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(rounding.largest + blockIdx.y, largest);
}

// The exponent of the power of two, such that it and its inverse are normal floats.
__device__ inline int exponent_of(uint32_t largest) {
  return min(14 + 127 - static_cast<int>(largest >> 23), 126);
}

__device__ inline float power_of_two(int exponent) {
  return __int_as_float((exponent + 127) << 23);
}

static __global__ void __launch_bounds__(kRoundThreads)
    round_to_half(const __grid_constant__ Rounding rounding) {
  const Operand& operand = rounding.operands[blockIdx.y];
  const int mine = exponent_of(rounding.largest[blockIdx.y]);
  const float scale = power_of_two(mine);
  for_each_piece(operand, [&](int64_t line, int64_t piece) {
    const float4* from = piece_at(operand, line, piece);
    const float4 a = __ldcs(from), b = __ldcs(from + 1);
    const auto pair = [&](float low, float high) {
      const __half2 both = __floats2half2_rn(low * scale, high * scale);
      return reinterpret_cast<const uint32_t&>(both);
    };
    reinterpret_cast<uint4*>(operand.to)[line * operand.line_pieces + piece] =
        make_uint4(pair(a.x, a.y), pair(a.z, a.w), pair(b.x, b.y), pair(b.z, b.w));
  });
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
    // In two halves: all of it may be more than a float holds.
    const int all = -(mine + exponent_of(rounding.largest[1]));
    rounding.factors[0] = power_of_two(all / 2);
    rounding.factors[1] = power_of_two(all - all / 2);
  }
}

}  // namespace block_sparse::cuda::sm90
