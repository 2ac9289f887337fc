// One warp zeroes one block.
#include "cuda/batches.cuh"
#include "cuda/zero.h"

namespace block_sparse::cuda {
namespace {

template <class Word>
__device__ void zero(char* block, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = threadIdx.x % kWarp; i < words; i += kWarp) {
    reinterpret_cast<Word*>(block)[i] = Word{};
  }
}

// Row y of the grid is tensor y.
__global__ void __launch_bounds__(kBatchThreads)
    zero_kernel(const __grid_constant__ Batch<BlocksToZero> batch) {
  const BlocksToZero& tensor = batch.tensors[blockIdx.y];
  auto* values = static_cast<char*>(tensor.values);
  const bool wide = (reinterpret_cast<uintptr_t>(values) | tensor.block_bytes) % sizeof(uint4) == 0;
  const int64_t step = int64_t{gridDim.x} * kBlocksPerCta;
  for (int64_t i = int64_t{blockIdx.x} * kBlocksPerCta + threadIdx.x / kWarp; i < tensor.count;
       i += step) {
    const int64_t block = tensor.blocks[i];
    if (block < 0 || block >= tensor.nnz) continue;
    char* begin = values + block * tensor.block_bytes;
    if (wide) {
      zero<uint4>(begin, tensor.block_bytes);
    } else {
      zero<char>(begin, tensor.block_bytes);
    }
  }
}

}  // namespace

void zero_blocks(std::span<const BlocksToZero> tensors, void* stream) {
  launch_in_batches(tensors, [&](dim3 grid, const Batch<BlocksToZero>& batch) {
    zero_kernel<<<grid, kBatchThreads, 0, stream_of(stream)>>>(batch);
    check_cuda(cudaGetLastError(), "zero_blocks_");
  });
}

}  // namespace block_sparse::cuda
