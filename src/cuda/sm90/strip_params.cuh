// What a strip kernel is given, what its warps share, and which tile is where. No loops.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "block_sparse/host_device.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/strip_config.h"

namespace block_sparse::cuda::sm90::strips {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The order of the tiles: tokens in groups, inside a group the panels (cluster by cluster),
// innermost the tokens of the group. So the x of a group stays in L2.
struct Raster {
  int panels;  // a multiple of the cluster size; their strips differ by one at most
  int strips;
  int token_tiles;
  int group;  // token tiles

  struct Place {
    int token_tile;
    int first_strip;
    int end_strip;
  };

  // Of the CTA `rank` of a cluster of `size`.
  BLOCK_SPARSE_HOST_DEVICE Place at(int tile, int rank, int size) const {
    const int panel_clusters = panels / size;
    const int per_group = group * panel_clusters;
    const int first = tile / per_group * group;
    const int tokens = token_tiles - first < group ? token_tiles - first : group;
    const int inside = tile % per_group;
    const int64_t panel = int64_t{inside / tokens} * size + rank;
    return {first + inside % tokens, static_cast<int>(panel * strips / panels),
            static_cast<int>((panel + 1) * strips / panels)};
  }
};

struct Params {
  CUtensorMap x;
  CUtensorMap values;
  // The pattern by block rows of the output: forward crow, row_masks and nothing (blocks are
  // numbered in this order); grad_input ccol, col_masks and perm.
  const int32_t* starts;
  const int32_t* masks;  // [block rows, mask_words]
  const int32_t* blocks;
  // Which block row is at which place, or null for their own order.
  const int32_t* order;
  const void* bias;
  void* output;
  int64_t output_stride;
  int tokens;
  int outputs;
  int rows;  // of pieces, whole block rows
  int nnz;
  int mask_words;
  int block_height;    // rows of a block in memory
  int log_row_pieces;  // pieces along a block's outputs
  int log_column_pieces;
  int stages;  // of x, per tile
  Raster raster;
  int tiles;
  int* counter;  // tiles taken beyond each cluster's first
};

// The row of pieces at a place. The one function that knows about `order`.
__device__ inline int row_at(const Params& params, int place) {
  if (params.order == nullptr) return place;
  const int pieces = 1 << params.log_row_pieces;
  const int last = (params.rows >> params.log_row_pieces) - 1;
  const int block_row = max(0, min(params.order[place >> params.log_row_pieces], last));
  return (block_row << params.log_row_pieces) + (place & (pieces - 1));
}

// Warps meet at barriers only: `full` and `empty` of each stage of x (W lies in a ring of its own
// that is freed with the stages), of each record and of each tile handed out.
template <Config kConfig>
struct alignas(1024) Shared {
  using Size = Sizes<kConfig>;
  static constexpr Tile kTile = kConfig.tile;

  unsigned char x[kTile.stages][Size::kXBytes];
  unsigned char w[kTile.ring][Size::kStripBytes];
  StageWork<kConfig> work[kTile.stages];
  Record<kConfig> records[Size::kRecords];
  // Of lane i: the block numbers of its block row, entry e at [e % kLookahead][i].
  int32_t blocks[kConfig.piece.transposed ? Size::kLookahead : 1][32];
  int32_t tiles[Size::kTiles];

  uint64_t full[kTile.stages];
  uint64_t empty[kTile.stages];
  uint64_t record_full[Size::kRecords];
  uint64_t record_empty[Size::kRecords];
  uint64_t tile_full[Size::kTiles];
  uint64_t tile_empty[Size::kTiles];  // of the cluster's first CTA

  __device__ void init_barriers() {
    for (int i = 0; i < kTile.stages; ++i) {
      ptx::init(ptx::address_of(&full[i]), 2);  // x; W
      ptx::init(ptx::address_of(&empty[i]), kTile.cluster * kTile.warpgroups * 4);
    }
    for (int i = 0; i < Size::kRecords; ++i) {
      ptx::init(ptx::address_of(&record_full[i]), 1);
      ptx::init(ptx::address_of(&record_empty[i]), 1);
    }
    for (int i = 0; i < Size::kTiles; ++i) {
      ptx::init(ptx::address_of(&tile_full[i]), 1);
      ptx::init(ptx::address_of(&tile_empty[i]), kTile.cluster * 2);  // the walk; the loads of x
    }
  }
};

constexpr int kMaxSharedBytes = 232448;

// A place in a ring of barriers, and the parity of this lap around it.
template <int kSize>
struct Cursor {
  uint32_t slot = 0;
  uint32_t lap = 0;

  __device__ void advance(uint32_t by = 1) {
    slot += by;
    if (slot >= kSize) {
      slot -= kSize;
      lap ^= 1;
    }
  }
};

// The tiles of this cluster, in the order in which its first CTA drew them.
template <Config kConfig>
class TileReader {
 public:
  // All lanes of a warp. kNoTile at the end.
  __device__ int next(Shared<kConfig>& shared) {
    ptx::wait_for_cluster(ptx::address_of(&shared.tile_full[at_.slot]), at_.lap);
    const int tile = shared.tiles[at_.slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      ptx::arrive_remote(ptx::at_rank(ptx::address_of(&shared.tile_empty[at_.slot]), 0));
    }
    at_.advance();
    return tile;
  }

 private:
  Cursor<Sizes<kConfig>::kTiles> at_;
};

}  // namespace block_sparse::cuda::sm90::strips
