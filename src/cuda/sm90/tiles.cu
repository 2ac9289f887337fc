// The kernels that plan the tiles of a pattern where it lies, on the GPU: three launches, one CTA
// per band of the grid. What they do is in plan.h.
#include "cuda/launch.h"
#include "cuda/sm90/plan.h"

namespace block_sparse::cuda::sm90 {
namespace {

constexpr int kWarps = Team::kThreads / 32;
constexpr int kNumberingCtas = 16;  // per band

__global__ void __launch_bounds__(Team::kThreads)
    count_units(Tiling t, PatternView pattern, int32_t* tiles) {
  __shared__ BandState state;
  __shared__ Team::State team_state;
  Team team(team_state);
  const Band band(t, blockIdx.x);
  read_band(team, state, t, band, pattern);
  if (threadIdx.x == 0) tiles[t.units_at + blockIdx.x] = static_cast<int32_t>(state.units);
}

template <int kRows>
__global__ void __launch_bounds__(Team::kThreads)
    plan(Tiling t, PatternView pattern, int32_t* tiles) {
  __shared__ BandState state;
  __shared__ Team::State team_state;
  Team team(team_state);
  const Band band(t, blockIdx.x);
  const Region region(t, blockIdx.x, tiles + t.units_at);
  read_band(team, state, t, band, pattern);
  const int count = plan_band<kRows>(team, state, t, band, region.first_number, region.limit,
                                     tiles + t.records_at + region.first_tile * t.record_size);
  if (threadIdx.x == 0) tiles[t.counts_at + blockIdx.x] = count;
}

// Puts the tiles of all bands into one order and looks up their block numbers, one warp per tile.
__global__ void __launch_bounds__(Team::kThreads)
    number_tiles(Tiling t, PatternView pattern, int32_t* tiles) {
  const int32_t* counts = tiles + t.counts_at;
  const int index = blockIdx.x;
  const Region region(t, index, tiles + t.units_at);
  int64_t first = 0;
  for (int i = 0; i < index; ++i) first += counts[i];
  const int count = counts[index];
  if (index == t.bands() - 1 && blockIdx.y == 0 && threadIdx.x == 0) {
    tiles[0] = static_cast<int32_t>(first + count);
  }
  for (int i = blockIdx.y * kWarps + threadIdx.x / 32; i < count; i += kNumberingCtas * kWarps) {
    const int64_t tile = region.first_tile + i;
    const int32_t* record = tiles + t.records_at + tile * t.record_size;
    if (threadIdx.x % 32 == 0) tiles[t.order_at + first + i] = static_cast<int32_t>(tile);
    for (int bit = threadIdx.x % 32; bit < t.rows * t.cols; bit += 32) {
      number_block(t, pattern, record, bit, tiles + t.numbers_at);
    }
  }
}

}  // namespace

int64_t tiles_size(GridShape grid, BlockShape block) { return tiling_of(grid, block).size; }

void build_tiles(const PatternView& pattern, BlockShape block, int32_t* tiles, void* stream) {
  const Tiling t = tiling_of(pattern.grid, block);
  if (t.size == 0) return;
  const cudaStream_t s = stream_of(stream);
  // What no tile comes to use is zero: the same pattern gives the same entries, all of them.
  check_cuda(cudaMemsetAsync(tiles, 0, static_cast<size_t>(t.size) * sizeof(int32_t), s),
             "build_tiles");
  const auto bands = static_cast<unsigned>(t.bands());
  count_units<<<bands, Team::kThreads, 0, s>>>(t, pattern, tiles);
  const int rows = t.rows / t.group;
  const auto kernel = rows == 2 ? plan<2> : rows == 4 ? plan<4> : plan<8>;
  kernel<<<bands, Team::kThreads, 0, s>>>(t, pattern, tiles);
  number_tiles<<<dim3(bands, kNumberingCtas), Team::kThreads, 0, s>>>(t, pattern, tiles);
  check_cuda(cudaGetLastError(), "build_tiles");
}

}  // namespace block_sparse::cuda::sm90
