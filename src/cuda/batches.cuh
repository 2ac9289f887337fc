// Launches that take many tensors at once: these travel in the parameters of the launch. Their
// kernels have a grid of (CTAs, tensors), and a warp for each block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cuda/launch.h"

namespace block_sparse::cuda {

constexpr int kWarp = 32;
constexpr int kBatchThreads = 256;
constexpr int kBlocksPerCta = kBatchThreads / kWarp;

// `Item` describes a tensor; its `count` is that of the blocks to work on.
template <class Item>
struct Batch {
  static constexpr size_t kTensors = 64;  // the parameters of a launch are at most 4 KB
  Item tensors[kTensors];
};

// Calls launch(grid, batch) for all tensors, so many at a time.
template <class Item, class Launch>
void launch_in_batches(std::span<const Item> tensors, const Launch& launch) {
  static_assert(sizeof(Batch<Item>) <= 4096);
  constexpr unsigned kMaxCtas = 1024;  // for one tensor: about what an H100 holds at once
  for (size_t begin = 0; begin < tensors.size(); begin += Batch<Item>::kTensors) {
    const auto some =
        tensors.subspan(begin, std::min(Batch<Item>::kTensors, tensors.size() - begin));
    Batch<Item> batch{};
    std::copy(some.begin(), some.end(), batch.tensors);
    int64_t most = 0;
    for (const Item& tensor : some) most = std::max(most, tensor.count);
    if (most == 0) continue;
    launch(
        dim3(std::min(ctas_for(most, kBlocksPerCta), kMaxCtas), static_cast<unsigned>(some.size())),
        batch);
  }
}

}  // namespace block_sparse::cuda
