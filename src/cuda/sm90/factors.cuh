// What sums are multiplied with before they are stored: nothing, or for float32 that was rounded to
// f16 (round.cuh) by two powers of two, since one may be more than a float holds.
#pragma once

namespace block_sparse::cuda::sm90 {

// T: what is stored.
template <class T>
struct Factors {
  __device__ explicit Factors(const float*) {}
  __device__ float times(float sum) const { return sum; }
};

template <>
struct Factors<float> {
  __device__ explicit Factors(const float* factors)
      : first(__ldg(factors)), second(__ldg(factors + 1)) {}
  __device__ float times(float sum) const { return sum * first * second; }

  float first, second;
};

}  // namespace block_sparse::cuda::sm90
