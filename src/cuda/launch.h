// What every CUDA kernel of the core needs around its launch: the caller's stream, a grid size,
// the error check and the device's attributes. Host code only; it starts nothing itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "block_sparse/check.h"

namespace block_sparse::cuda {

inline cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }

// CTAs for `count` work items in a grid-stride loop. The cap keeps the grid legal for any count;
// it is far more than a GPU holds at once.
inline unsigned ctas_for(int64_t count, int64_t per_cta) {
  constexpr int64_t kMaxCtas = 1 << 20;
  return static_cast<unsigned>(std::min((count + per_cta - 1) / per_cta, kMaxCtas));
}

// Not bad input, so not an Error: a Python caller sees a RuntimeError.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) [[unlikely]] {
    throw std::runtime_error(concat(what, ": ", cudaGetErrorString(error)));
  }
}

// Attributes of the current device; the driver keeps them, so asking is cheap.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

}  // namespace block_sparse::cuda
