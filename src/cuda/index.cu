// The packed index, built on the GPU from its BSR half. No sort, no atomics, no workspace: each
// block column looks itself up in every block row by binary search, so the order is fixed.
#include "cuda/index.h"
#include "cuda/launch.h"

namespace block_sparse::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The first position in [begin, end) of ascending `entries` that holds `value` or more.
__device__ int32_t lower_bound(const int32_t* entries, int32_t begin, int32_t end, int32_t value) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (entries[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Offsets may be corrupt; what is read through them stays inside the array.
__device__ int32_t clamp(int32_t offset, int64_t nnz) {
  return static_cast<int32_t>(offset < 0 ? 0 : offset < nnz ? offset : nnz);
}

// One thread per block: its block row is the last whose first block is not after it.
__global__ void __launch_bounds__(kThreads)
    find_rows(const int32_t* crow, GridShape grid, int32_t* row) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x; block < grid.nnz;
       block += step) {
    // The first crow after this block, looked for among crow[1 .. block_rows - 1].
    row[block] = lower_bound(crow + 1, 0, static_cast<int32_t>(grid.block_rows) - 1,
                             static_cast<int32_t>(block) + 1);
  }
}

// One warp per block column, and one for the end of the last; a lane looks at every 32nd block
// row. A column starts after all blocks of smaller columns, which the first loop counts.
__global__ void __launch_bounds__(kThreads)
    transpose(const int32_t* crow, const int32_t* col, GridShape grid, int32_t* ccol, int32_t* trow,
              int32_t* perm) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t{gridDim.x} * (kThreads / kWarp);
  for (int64_t column = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
       column <= grid.block_cols; column += step) {
    const auto c = static_cast<int32_t>(column);
    uint32_t start = 0;  // unsigned: in a corrupt pattern the sum may wrap
    for (int64_t r = lane; r < grid.block_rows; r += kWarp) {
      const int32_t begin = clamp(crow[r], grid.nnz);
      start += lower_bound(col, begin, clamp(crow[r + 1], grid.nnz), c) - begin;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      start += __shfl_xor_sync(kAllLanes, start, offset);
    }
    if (lane == 0) ccol[c] = static_cast<int32_t>(start);
    if (column == grid.block_cols) return;

    for (int64_t first = 0; first < grid.block_rows; first += kWarp) {
      const int64_t r = first + lane;
      int32_t block = 0;
      bool present = false;
      if (r < grid.block_rows) {
        const int32_t end = clamp(crow[r + 1], grid.nnz);
        block = lower_bound(col, clamp(crow[r], grid.nnz), end, c);
        present = block < end && col[block] == c;
      }
      const unsigned found = __ballot_sync(kAllLanes, present);
      const uint32_t slot = start + __popc(found & ((1u << lane) - 1));
      if (present && slot < grid.nnz) {  // in a corrupt pattern there may be no room
        trow[slot] = static_cast<int32_t>(r);
        perm[slot] = block;
      }
      start += __popc(found);
    }
  }
}

}  // namespace

void build_index(const int32_t* crow, const int32_t* col, GridShape grid, int32_t* packed,
                 void* stream) {
  int32_t* packed_col = packed + grid.block_rows + 1;
  int32_t* row = packed_col + grid.nnz;
  int32_t* ccol = row + grid.nnz;
  int32_t* trow = ccol + grid.block_cols + 1;
  int32_t* perm = trow + grid.nnz;

  const auto copy = [&](int32_t* to, const int32_t* from, int64_t count) {
    check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(int32_t),
                               cudaMemcpyDeviceToDevice, stream_of(stream)),
               "index_from_bsr");
  };
  copy(packed, crow, grid.block_rows + 1);
  if (grid.nnz > 0) {
    copy(packed_col, col, grid.nnz);
    find_rows<<<ctas_for(grid.nnz, kThreads), kThreads, 0, stream_of(stream)>>>(crow, grid, row);
  }
  transpose<<<ctas_for(grid.block_cols + 1, kThreads / kWarp), kThreads, 0, stream_of(stream)>>>(
      crow, col, grid, ccol, trow, perm);
  check_cuda(cudaGetLastError(), "index_from_bsr");
}

}  // namespace block_sparse::cuda
