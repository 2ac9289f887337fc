// One warp sums one block.
#include "cuda/batches.cuh"
#include "cuda/dots.h"

namespace block_sparse::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// What a lane loads at once: 16 bytes, or one element where blocks are not aligned to that.
template <class T, int size>
struct alignas(size * sizeof(T)) Word {
  T elements[size];
};

template <class T, int size>
__device__ auto lane_sum(const T* a, const T* b, int64_t elements) {
  using Sum = typename Traits<T>::Accumulate;
  const auto* left = reinterpret_cast<const Word<T, size>*>(a);
  const auto* right = reinterpret_cast<const Word<T, size>*>(b);
  Sum sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < elements / size; i += kWarp) {
    const auto x = left[i], y = right[i];
    Sum part = 0;  // long blocks: fewer roundings one after the other
    for (int k = 0; k < size; ++k) part += load<Sum>(x.elements[k]) * load<Sum>(y.elements[k]);
    sum += part;
  }
  return sum;
}

// Row y of the grid is tensor y.
template <class T>
__global__ void __launch_bounds__(kBatchThreads)
    dots_kernel(const __grid_constant__ Batch<BlockDots> batch) {
  using Sum = typename Traits<T>::Accumulate;
  constexpr int size = 16 / sizeof(T);
  const BlockDots& tensor = batch.tensors[blockIdx.y];
  const auto *a = static_cast<const T*>(tensor.a), *b = static_cast<const T*>(tensor.b);
  const uint64_t bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  const bool wide = bits % 16 == 0 && tensor.elements % size == 0;
  const int64_t step = int64_t{gridDim.x} * kBlocksPerCta;
  for (int64_t i = int64_t{blockIdx.x} * kBlocksPerCta + threadIdx.x / kWarp; i < tensor.count;
       i += step) {
    const int64_t block = tensor.blocks == nullptr ? i : tensor.blocks[i];
    if (block < 0 || block >= tensor.nnz) continue;  // all lanes of the warp together
    const T *left = a + i * tensor.elements, *right = b + block * tensor.elements;
    Sum sum = wide ? lane_sum<T, size>(left, right, tensor.elements)
                   : lane_sum<T, 1>(left, right, tensor.elements);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (threadIdx.x % kWarp == 0) static_cast<Sum*>(tensor.sums)[block] = sum;
  }
}

}  // namespace

void block_dots(Dtype dtype, std::span<const BlockDots> tensors, void* stream) {
  launch_in_batches(tensors, [&](dim3 grid, const Batch<BlockDots>& batch) {
    visit(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      dots_kernel<T><<<grid, kBatchThreads, 0, stream_of(stream)>>>(batch);
    });
    check_cuda(cudaGetLastError(), "block_dots");
  });
}

}  // namespace block_sparse::cuda
