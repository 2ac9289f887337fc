// The walk of a strip kernel: one warp reads the pattern where it lies and writes, stage by stage,
// which pieces of W are needed and where they go. No list is made before the kernel runs, so there
// is none to go stale. It touches neither x nor W.
//
// Lane i owns the i-th row of pieces of the tile and the mask of its block row, a word at a time.
// Where blocks are not numbered in this order, their numbers come into shared memory some stages
// before they are looked at.
#pragma once

#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

// Of the lanes that have a piece in a column: the strips that have one, as the lowest lane of each.
template <int kRowsPerStrip>
BLOCK_SPARSE_HOST_DEVICE constexpr uint32_t strips_of(uint32_t lanes) {
  return kRowsPerStrip == 1 ? lanes : (lanes | lanes >> 1) & 0x55555555u;
}

template <Config kConfig>
class Walk {
 public:
  using Size = Sizes<kConfig>;

  __device__ Walk(const Params& params, Shared<kConfig>& shared, int rank)
      : params_(params), shared_(shared), rank_(rank), lane_(threadIdx.x % 32) {}

  __device__ void run(int tile) {
    TileReader<kConfig> tiles;
    while (tile >= 0) {
      begin(tile);
      int drawn = 0;
      if (rank_ == 0 && lane_ == 0) drawn = atomicAdd(params_.counter, 1);
      for (int stage = 0; stage < params_.stages; ++stage) {
        step(tile, stage);
        // The draw takes its time: not before some stages are written, unless these are all.
        if (rank_ == 0 && stage == min(2, params_.stages - 1)) hand_out(drawn);
      }
      tile = tiles.next(shared_);
    }
    for (int loader = 0; loader < 2; ++loader) end();
  }

 private:
  // Gives the cluster its next tile: every lane below the cluster size tells one CTA.
  __device__ void hand_out(int drawn) {
    const int next = __shfl_sync(kAllLanes, drawn, 0) + gridDim.x / kConfig.tile.cluster;
    ptx::wait(ptx::address_of(&shared_.tile_empty[handed_.slot]), handed_.lap ^ 1);
    if (lane_ < kConfig.tile.cluster) {
      ptx::send(ptx::at_rank(ptx::address_of(&shared_.tiles[handed_.slot]), lane_),
                next < params_.tiles ? next : kNoTile,
                ptx::at_rank(ptx::address_of(&shared_.tile_full[handed_.slot]), lane_));
    }
    handed_.advance();
  }

  __device__ int clamp_entry(int entry) const { return max(0, min(entry, params_.nnz)); }

  __device__ void begin(int tile) {
    const Raster::Place place = params_.raster.at(tile, rank_, kConfig.tile.cluster);
    const int at = place.first_strip * Size::kRowsPerStrip + lane_;
    next_ = end_ = 0;
    mask_ = nullptr;
    if (at < min(place.end_strip * Size::kRowsPerStrip, params_.rows)) {
      const int row = row_at(params_, at);
      const int block_row = row >> params_.log_row_pieces;
      row_piece_ = row & ((1 << params_.log_row_pieces) - 1);
      next_ = clamp_entry(params_.starts[block_row]);
      end_ = clamp_entry(params_.starts[block_row + 1]);
      mask_ = params_.masks + int64_t{block_row} * params_.mask_words;
    }
    word_ = ahead_ = 0;
    if (mask_ != nullptr) ahead_ = static_cast<uint32_t>(*mask_);
    if constexpr (kConfig.piece.transposed) {
      fetched_ = next_;
      fetch<Size::kLookahead>();
    }
  }

  // Asks for the block numbers up to kLookahead entries ahead, kMost at most.
  template <int kMost>
  __device__ void fetch() {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (fetched_ < min(end_, next_ + Size::kLookahead)) {
        ptx::copy_word(&shared_.blocks[fetched_ % Size::kLookahead][lane_],
                       params_.blocks + fetched_);
        ++fetched_;
      }
    }
    ptx::commit_copies();
  }

  // The piece of entry `entry` in column `column` (of pieces).
  __device__ int32_t piece(int entry, int column) const {
    int block = entry;
    if constexpr (kConfig.piece.transposed) {
      block = shared_.blocks[entry % Size::kLookahead][lane_];
    }
    const int column_piece = column & ((1 << params_.log_column_pieces) - 1);
    const int down = kConfig.piece.transposed ? column_piece * kConfig.piece.depth
                                              : row_piece_ * kConfig.piece.outputs;
    const int across = kConfig.piece.transposed ? row_piece_ : column_piece;
    return static_cast<int32_t>(static_cast<uint32_t>(block) * params_.block_height + down) |
           across;
  }

  __device__ void step(int tile, int stage) {
    if constexpr (kConfig.piece.transposed) {
      if (stage == 0) {
        ptx::wait_for_copies<0>();
      } else {
        // The block numbers of this stage were asked for at least so many stages ago.
        ptx::wait_for_copies<Size::kLookahead / Size::kColumns - 1>();
      }
    }
    const int first = stage * Size::kColumns;
    const int log_pieces = params_.log_column_pieces;
    const int block_column = first >> log_pieces;
    // A stage lies within a word: 32 is a multiple of its block columns.
    if (block_column % 32 == 0 && (first & ((1 << log_pieces) - 1)) == 0) {
      word_ = ahead_;
      if (mask_ != nullptr) ahead_ = static_cast<uint32_t>(*++mask_);
    }
    const int block_columns = max(1, Size::kColumns >> log_pieces);
    const uint32_t hit = word_ >> block_column % 32 & ((1u << block_columns) - 1);

    ptx::wait(ptx::address_of(&shared_.record_empty[record_.slot]), record_.lap ^ 1);
    Record<kConfig>& record = shared_.records[record_.slot];
    const int strip_lane = lane_ & ~(Size::kRowsPerStrip - 1);
    int strips = 0;
#pragma unroll
    for (int i = 0; i < Size::kColumns; ++i) {
      const uint32_t of_stage = i >> log_pieces;  // which of its block columns
      const bool mine = hit >> of_stage & 1;
      const uint32_t present = strips_of<Size::kRowsPerStrip>(__ballot_sync(kAllLanes, mine));
      if (present >> strip_lane & 1) {  // else-part of a strip: zeros
        const int before = strips + __popc(present & ((1u << strip_lane) - 1));
        record.piece[before * Size::kRowsPerStrip + lane_ - strip_lane] =
            mine ? piece(next_ + __popc(hit & ((1u << of_stage) - 1)), first + i) : kNoPiece;
      }
      if (lane_ == 0) record.work.present[i] = present;
      strips += __popc(present);
    }
    publish(record, tile, strips);

    const int after = first + Size::kColumns;
    if ((after & ((1 << log_pieces) - 1)) == 0) next_ += __popc(hit);
    if constexpr (kConfig.piece.transposed) fetch<Size::kColumns>();
  }

  // The rest of a record: where its strips go, and how far back the stage is whose strips they
  // overwrite. Lane i remembers where the stage i + 1 back began.
  __device__ void publish(Record<kConfig>& record, int tile, int strips) {
    const uint32_t end = used_ + strips;
    const bool in_the_way = static_cast<int32_t>(end - kConfig.tile.ring - began_) > 0;
    const uint32_t stages = __ballot_sync(kAllLanes, in_the_way && lane_ < kConfig.tile.stages);
    if (lane_ == 0) {
      record.work.tile = tile;
      record.slot = slot_;
      record.pieces = strips * Size::kRowsPerStrip;
      record.back = stages == 0 ? kConfig.tile.stages : __ffs(stages);
    }
    __syncwarp();
    if (lane_ == 0) ptx::arrive(ptx::address_of(&shared_.record_full[record_.slot]));
    record_.advance();

    const uint32_t earlier = __shfl_up_sync(kAllLanes, began_, 1);
    began_ = lane_ == 0 ? used_ : earlier;
    used_ = end;
    slot_ += strips;
    if (slot_ >= kConfig.tile.ring) slot_ -= kConfig.tile.ring;
  }

  __device__ void end() {
    ptx::wait(ptx::address_of(&shared_.record_empty[record_.slot]), record_.lap ^ 1);
    publish(shared_.records[record_.slot], kNoTile, 0);
  }

  const Params& params_;
  Shared<kConfig>& shared_;
  const int rank_;
  const int lane_;
  Cursor<Size::kRecords> record_;
  Cursor<Size::kTiles> handed_;
  int row_piece_ = 0;              // which of its block row's
  const int32_t* mask_ = nullptr;  // of the block row: the word that is ahead
  uint32_t word_ = 0;              // the word that the stage is in
  uint32_t ahead_ = 0;
  int next_ = 0;  // entries of the block row: the next, the first not asked for, the end
  int fetched_ = 0;
  int end_ = 0;
  uint32_t used_ = 0;  // strips since the kernel began
  int slot_ = 0;       // the same, in the ring
  uint32_t began_ = 0;
};

}  // namespace block_sparse::cuda::sm90::strips
