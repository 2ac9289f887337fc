// Whether the current GPU is a Hopper. Host code.
#pragma once

#include <array>
#include <atomic>

#include "cuda/launch.h"
#include "kernel.h"

namespace block_sparse::cuda::sm90 {

// A refusal on any GPU but compute capability 9.x. Asks the driver once per device.
inline Refusal hopper_only() {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> known{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();  // it would fail whatever is launched next
    return "needs a GPU, and there is none";
  }
  int major = device < kDevices ? known[device].load() : 0;
  if (major == 0) {
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    if (device < kDevices) known[device] = major;
  }
  if (major != 9) return concat("needs a GPU of compute capability 9, not ", major);
  return std::nullopt;
}

}  // namespace block_sparse::cuda::sm90
