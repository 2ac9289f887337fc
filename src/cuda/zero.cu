// One warp zeroes one block. The tensors travel in the parameters of the launch.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/zero.h"

namespace block_sparse::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kBlocksPerCta = kThreads / kWarp;
constexpr unsigned kMaxCtas = 1024;  // for one tensor: about what an H100 holds at once
constexpr size_t kTensors = 64;      // of a launch, whose parameters are at most 4 KB

struct Batch {
  BlocksToZero tensors[kTensors];
};
static_assert(sizeof(Batch) <= 4096);

template <class Word>
__device__ void zero(char* block, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t i = threadIdx.x % kWarp; i < words; i += kWarp) {
    reinterpret_cast<Word*>(block)[i] = Word{};
  }
}

// Row y of the grid is tensor y.
__global__ void __launch_bounds__(kThreads) zero_kernel(const __grid_constant__ Batch batch) {
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
  for (; !tensors.empty(); tensors = tensors.subspan(std::min(kTensors, tensors.size()))) {
    const auto some = tensors.first(std::min(kTensors, tensors.size()));
    Batch batch{};
    std::copy(some.begin(), some.end(), batch.tensors);
    int64_t most = 0;
    for (const BlocksToZero& tensor : some) most = std::max(most, tensor.count);
    if (most == 0) continue;
    const unsigned ctas = std::min(ctas_for(most, kBlocksPerCta), kMaxCtas);
    const dim3 grid(ctas, static_cast<unsigned>(some.size()));
    zero_kernel<<<grid, kThreads, 0, stream_of(stream)>>>(batch);
    check_cuda(cudaGetLastError(), "zero_blocks_");
  }
}

}  // namespace block_sparse::cuda
