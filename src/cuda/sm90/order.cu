// The order in which block rows (or block columns) are taken into panels: those with many columns
// in common side by side, in twos and fours, so that what is loaded for one serves the others.
// Starting from their natural order, pairs of groups swap members while that gains an overlap.
#include "cuda/launch.h"
#include "cuda/sm90/order.h"

namespace block_sparse::cuda::sm90 {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kMaxShared = 200 << 10;

struct Lines {
  const int32_t* start;  // [count + 1]
  const int32_t* cross;  // [nnz]
  int count, crosses, nnz;
  int words;  // of a mask
};

Lines lines_of(const PatternView& pattern, bool transposed) {
  const GridShape& grid = pattern.grid;
  Lines lines{pattern.crow,
              pattern.col,
              static_cast<int>(grid.block_rows),
              static_cast<int>(grid.block_cols),
              static_cast<int>(grid.nnz),
              0};
  if (transposed) {
    lines.start = pattern.ccol;
    lines.cross = pattern.trow;
    std::swap(lines.count, lines.crosses);
  }
  lines.words = (lines.crosses + 31) / 32;
  return lines;
}

// Masks of the lines and of their pairs, and where both are.
int64_t shared_bytes(const Lines& lines) {
  const int64_t padded = order_size(lines.count);
  return (padded + padded / 2) * (lines.words + 1) * int64_t{sizeof(int32_t)};
}

// Rearranges the items so that neighbours (2k, 2k + 1) overlap more. In each round every group
// meets another one, and all rounds make each meet all others.
__device__ void pair_up(int items, int words, const uint32_t* masks, int* at) {
  const int groups = items / 2, players = groups + groups % 2;
  // More gain under half a percent of the union, and time grows with the third power of the lines.
  const int sweeps = groups > 256 ? 1 : 2;
  const auto overlap = [&](int a, int b) {
    int bits = 0;
    for (int w = 0; w < words; ++w) bits += __popc(masks[a * words + w] & masks[b * words + w]);
    return bits;
  };
  for (int round = 0; round < sweeps * (players - 1); ++round) {
    for (int t = threadIdx.x; t < players / 2; t += kThreads) {
      const int first = (round + t) % (players - 1);
      const int second =
          t == 0 ? players - 1 : (round % (players - 1) + players - 1 - t) % (players - 1);
      if (max(first, second) >= groups) continue;
      const int a = at[2 * first], b = at[2 * first + 1];
      const int c = at[2 * second], d = at[2 * second + 1];
      const int now = overlap(a, b) + overlap(c, d);
      const int straight = overlap(a, d) + overlap(c, b), crossed = overlap(a, c) + overlap(b, d);
      if (straight > now && straight >= crossed) {
        at[2 * first + 1] = d;
        at[2 * second + 1] = b;
      } else if (crossed > now) {
        at[2 * first + 1] = c;
        at[2 * second] = b;
      }
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) choose_order(Lines lines, int padded, int32_t* order) {
  extern __shared__ uint32_t shared[];
  uint32_t* masks = shared;
  uint32_t* pair_masks = masks + padded * lines.words;
  int* at = reinterpret_cast<int*>(pair_masks + padded / 2 * lines.words);
  int* pair_at = at + padded;
  for (int i = threadIdx.x; i < padded * lines.words; i += kThreads) masks[i] = 0;
  for (int i = threadIdx.x; i < padded; i += kThreads) at[i] = i;
  for (int i = threadIdx.x; i < padded / 2; i += kThreads) pair_at[i] = i;
  __syncthreads();
  for (int line = threadIdx.x / 32; line < lines.count; line += kThreads / 32) {
    const int begin = min(max(lines.start[line], 0), lines.nnz);
    const int end = min(max(lines.start[line + 1], 0), lines.nnz);
    for (int entry = begin + threadIdx.x % 32; entry < end; entry += 32) {
      const int cross = lines.cross[entry];
      if (cross >= 0 && cross < lines.crosses) {
        atomicOr(&masks[line * lines.words + cross / 32], 1u << cross % 32);
      }
    }
  }
  __syncthreads();
  pair_up(padded, lines.words, masks, at);
  for (int i = threadIdx.x; i < padded / 2 * lines.words; i += kThreads) {
    const int pair = i / lines.words, word = i % lines.words;
    pair_masks[i] =
        masks[at[2 * pair] * lines.words + word] | masks[at[2 * pair + 1] * lines.words + word];
  }
  __syncthreads();
  pair_up(padded / 2, lines.words, pair_masks, pair_at);
  for (int i = threadIdx.x; i < padded; i += kThreads) order[i] = at[2 * pair_at[i / 2] + i % 2];
}

__global__ void __launch_bounds__(kThreads) keep_order(int padded, int32_t* order) {
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < padded; i += gridDim.x * kThreads) {
    order[i] = i;
  }
}

}  // namespace

void build_order(const PatternView& pattern, bool transposed, int32_t* order, void* stream) {
  const Lines lines = lines_of(pattern, transposed);
  const int padded = static_cast<int>(order_size(lines.count));
  if (padded == 0) return;
  const int64_t bytes = shared_bytes(lines);
  if (bytes > kMaxShared) {
    keep_order<<<ctas_for(padded, kThreads), kThreads, 0, stream_of(stream)>>>(padded, order);
  } else {
    check_cuda(cudaFuncSetAttribute(choose_order, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "build_order");
    choose_order<<<1, kThreads, static_cast<size_t>(bytes), stream_of(stream)>>>(lines, padded,
                                                                                 order);
  }
  check_cuda(cudaGetLastError(), "build_order");
}

}  // namespace block_sparse::cuda::sm90
