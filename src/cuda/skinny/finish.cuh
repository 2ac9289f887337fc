// What the few-token kernel leaves: rows of blocks that several CTAs had a part of, and rows
// without blocks. A small kernel that starts while the other still runs.
#pragma once

#include "cuda/skinny/store.cuh"
#include "cuda/skinny/stream.cuh"

namespace block_sparse::cuda::skinny {

// The bias alone, or zero.
template <class C>
__device__ void store_empty_rows(const Params& params) {
  const int ctas = gridDim.x * gridDim.y;
  for (int row = blockIdx.x + gridDim.x * blockIdx.y; row < params.output_grid; row += ctas) {
    if (params.starts[row] < params.starts[row + 1]) continue;
    const int first = row * params.block_outputs;
    for (int i = threadIdx.x; i < params.block_outputs * params.tokens; i += blockDim.x) {
      const int output = first + i % params.block_outputs, token = i / params.block_outputs;
      if (output >= params.outputs) continue;
      static_cast<typename C::T*>(params.output)[token * params.output_stride + output] =
          narrow<typename C::T>(bias_of<typename C::T>(params, output));
    }
  }
}

// Whether a CTA is in the same row as the end of the one before.
template <class C>
__device__ bool goes_on(const Params& params, int cta) {
  const int unit = units_of_cta(params, cta).begin;
  return cta > 0 && cta < params.ctas.divisor() &&
         row_of<C>(params, unit - 1) == row_of<C>(params, unit);
}

// Whether all units of a CTA are in one row.
template <class C>
__device__ bool is_one_row(const Params& params, int cta) {
  const Range units = units_of_cta(params, cta);
  return row_of<C>(params, units.begin) == row_of<C>(params, units.end - 1);
}

// A float4 for each thread; grid (CTAs of the other kernel, as many as it takes).
constexpr unsigned kFinishCtas = 2;
constexpr int kFinishThreads = 256;

template <class C>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ Params params) {
  ptx::let_next_kernel_start();
  store_empty_rows<C>(params);
  const int first = blockIdx.x;  // the CTA that began the row
  const bool begun =
      goes_on<C>(params, first + 1) && !(is_one_row<C>(params, first) && goes_on<C>(params, first));
  int end = first + 2;  // past the CTA that ended it
  while (begun && goes_on<C>(params, end) && is_one_row<C>(params, end - 1)) ++end;
  const int size = params.members * C::kSums;  // of the parts of a CTA
  const int output =
      begun ? row_of<C>(params, units_of_cta(params, first + 1).begin) * params.block_outputs : 0;
  ptx::wait_for_previous_kernel();
  if (!begun) return;
#pragma unroll 2
  for (int i = blockIdx.y * kFinishThreads + threadIdx.x; i < size;
       i += gridDim.y * kFinishThreads) {
    const float4* continued = params.continued + int64_t{first} * size + i;
    float4 more = continued[size];
    float4 sums = params.begun[int64_t{first} * size + i];
#pragma unroll 4
    for (int cta = first + 2; cta <= end; ++cta) {
      sums.x += more.x, sums.y += more.y, sums.z += more.z, sums.w += more.w;
      if (cta < end) more = continued[int64_t{cta - first} * size];
    }
    const int piece = i / 32;  // [strip][kParts][kHigh][kWide]
    const int wide = piece % C::kWide, high = piece / C::kWide % C::kHigh;
    const int member = piece / C::kWide / C::kHigh;
    store<C>(params, member % C::kParts * C::kWarpTokens + wide * 8,
             output + member / C::kParts * C::kOutputs + high * 16, sums, threadIdx.x % 32);
  }
}

}  // namespace block_sparse::cuda::skinny
