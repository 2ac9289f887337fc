// What the kernels of this directory ask of the current device. Host code; answers are remembered
// per device, since every call of a product asks.
#pragma once

#include <array>
#include <atomic>

#include "cuda/launch.h"
#include "kernel.h"

namespace block_sparse::cuda::sm90 {

struct Device {
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
};

inline Device current_device() {
  // Packed into one word, so that threads may race to write the same answer.
  static std::array<std::atomic<uint64_t>, 64> known{};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  auto& slot = known[static_cast<size_t>(device) % known.size()];
  uint64_t packed = device < static_cast<int>(known.size()) ? slot.load() : 0;
  if (packed == 0) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return static_cast<uint64_t>(value);
    };
    packed = attribute(cudaDevAttrComputeCapabilityMajor) << 48 |
             attribute(cudaDevAttrComputeCapabilityMinor) << 32 |
             attribute(cudaDevAttrMultiProcessorCount);
    if (device < static_cast<int>(known.size())) slot.store(packed);
  }
  return {static_cast<int>(packed >> 48), static_cast<int>(packed >> 32 & 0xffff),
          static_cast<int>(packed & 0xffffffff)};
}

inline Refusal refuse_device() {
  const Device device = current_device();
  if (device.major == 9) return std::nullopt;
  return concat("the device has compute capability ", device.major, ".", device.minor,
                "; the kernel needs 9.x");
}

// Lets a kernel use more than 48 KiB of shared memory on the current device, once.
template <auto kernel>
void allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load() & bit) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute");
  done.fetch_or(bit);
}

}  // namespace block_sparse::cuda::sm90
