// The pattern as bits, a line after the other: what a kernel can look at without following indices.
#include "cuda/launch.h"
#include "cuda/sm90/masks.h"

namespace block_sparse::cuda::sm90 {
namespace {

constexpr int kThreads = 256;

// One warp per line. Its lanes own a word each, and look for it in the line's ascending entries.
__global__ void __launch_bounds__(kThreads)
    fill_masks(const int32_t* start, const int32_t* cross, int lines, int words, int nnz,
               uint32_t* masks) {
  const int lane = threadIdx.x % 32;
  for (int line = (blockIdx.x * kThreads + threadIdx.x) / 32; line < lines;
       line += gridDim.x * (kThreads / 32)) {
    const int begin = min(max(start[line], 0), nnz), end = min(max(start[line + 1], 0), nnz);
    for (int word = lane; word < words; word += 32) {
      int entry = begin;
      for (int last = end; entry < last;) {  // the first entry of this word or a later one
        const int middle = entry + (last - entry) / 2;
        if (cross[middle] < word * 32) {
          entry = middle + 1;
        } else {
          last = middle;
        }
      }
      uint32_t bits = 0;
      for (; entry < end && cross[entry] < (word + 1) * 32; ++entry)
        bits |= 1u << cross[entry] % 32;
      masks[int64_t{line} * words + word] = bits;
    }
  }
}

}  // namespace

void build_masks(const PatternView& pattern, bool transposed, int32_t* masks, void* stream) {
  const GridShape& grid = pattern.grid;
  const int64_t lines = transposed ? grid.block_cols : grid.block_rows;
  const int64_t words = mask_words(transposed ? grid.block_rows : grid.block_cols);
  if (lines == 0) return;
  fill_masks<<<ctas_for(lines, kThreads / 32), kThreads, 0, stream_of(stream)>>>(
      transposed ? pattern.ccol : pattern.crow, transposed ? pattern.trow : pattern.col,
      static_cast<int>(lines), static_cast<int>(words), static_cast<int>(grid.nnz),
      reinterpret_cast<uint32_t*>(masks));
  check_cuda(cudaGetLastError(), "build_masks");
}

}  // namespace block_sparse::cuda::sm90
