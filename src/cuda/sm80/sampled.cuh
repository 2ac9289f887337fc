// The sampled product's kernel of Ampere: dW = dyt x at the present blocks, mma.sync, 16-bit
// elements, blocks with sides that are multiples of 16. Device code; it is launched in sampled.cu.
//
// A CTA computes 128 gathered outputs x 256 gathered inputs, and the tokens are what is summed
// over. Both are gathered 16 at a time. Which go together is planned with the pattern where it was
// planned for Hopper (sm90/tiles.h); else a tile is a run of blocks of one block row.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/sm80/ptx.cuh"
#include "cuda/sm90/sampled_args.cuh"

namespace block_sparse::cuda::sm80::sampled_product {

using sm90::ceil_div;
using sm90::kTileIn;
using sm90::kTileOut;

constexpr int kWarp = 32;
constexpr int kUnit = 16;
constexpr int kOutUnits = kTileOut / kUnit, kInUnits = kTileIn / kUnit;
// Warps of 64 x 64: 128 sums a thread, and half the reads of shared memory of 32 x 128.
constexpr int kWarpUnits = 4;
constexpr int kOutWarps = kOutUnits / kWarpUnits;
constexpr int kThreads = kOutWarps * (kInUnits / kWarpUnits) * kWarp;

// A stage of 32 tokens; four fit the 99 KB that a multiprocessor of 8.6 or 8.9 gives.
constexpr int kStageTokens = 32, kStages = 4;
constexpr int kParts = kStageTokens / 16;  // of a stage
static_assert(kParts % 2 == 0, "two fragments take turns");
constexpr int kOutRow = kTileOut * 2, kInRow = kTileIn * 2;  // bytes
constexpr int kStageBytes = kStageTokens * (kOutRow + kInRow);

constexpr int kNoFeature = 0x40000000;
constexpr int64_t kNowhere = -1;

struct Shared {
  char stages[kStages][kStageBytes];
  int64_t to[kOutUnits][kInUnits];   // where 16 x 16 of the tile go in the values, or kNowhere
  int out[kOutUnits], in[kInUnits];  // first features, or kNoFeature
};

struct Args {
  const void* dy;
  const void* x;
  int64_t dy_stride, x_stride;
  int tokens, out_features, in_features;
  sm90::sampled_product::SampledArgs tiles;  // planned, if its tiles are not null
  // Else a tile is kInUnits pieces of blocks, as they follow each other, x kOutUnits of their rows.
  const int32_t* row;
  const int32_t* col;
  int block_rows, block_cols;
  int pieces, row_groups;  // of a block
};

// The tile as it is planned.
__device__ inline void describe_planned(const Args& args, int tile, Shared& shared) {
  if (threadIdx.x >= kOutUnits * kInUnits) return;
  const sm90::Tiling& t = args.tiles.tiling;
  const sm90::sampled_product::TileReader reader{args.tiles};
  const int32_t* record = reader.record(tile);
  const int o = threadIdx.x / kInUnits, i = threadIdx.x % kInUnits;
  const int r = o * kUnit / t.unit_out, c = i * kUnit / t.unit_in;
  const auto row = static_cast<int>(reader.unit(record, r));
  const auto col = static_cast<int>(reader.unit(record, t.rows + c));
  const int in_row = o * kUnit % t.unit_out, in_col = i * kUnit % t.unit_in;
  if (i == 0) shared.out[o] = row < t.row_units ? row * t.unit_out + in_row : kNoFeature;
  if (o == 0) shared.in[i] = col < t.col_units ? col * t.unit_in + in_col : kNoFeature;

  // Of the blocks that the tile owns, this is so many-th.
  const int bit = r * t.cols + c;
  int64_t at = static_cast<uint32_t>(record[0]);
  for (int word = 0; word < bit / 32; ++word) at += __popc(record[1 + word]);
  const uint32_t mask = record[1 + bit / 32];
  at += __popc(mask & ((1u << bit % 32) - 1));
  int64_t block = -1;
  if ((mask >> bit % 32 & 1) && at < t.numbers_size()) block = args.tiles.tiles[t.numbers_at + at];
  shared.to[o][i] = kNowhere;
  if (block < 0 || block >= args.tiles.nnz) return;
  shared.to[o][i] = (block * args.tiles.block_out + row % t.parts_out * t.unit_out + in_row) *
                        args.tiles.block_in +
                    col % t.parts_in * t.unit_in + in_col;
}

// Pieces [begin, end), of one block row; the `group`-th 128 rows of the blocks.
__device__ inline void describe_run(const Args& args, int64_t begin, int64_t end, int group,
                                    Shared& shared) {
  if (threadIdx.x >= kOutUnits * kInUnits) return;
  const int o = threadIdx.x / kInUnits, i = threadIdx.x % kInUnits;
  const int64_t piece = min(begin + i, end - 1), block = piece / args.pieces;
  const int in_block = static_cast<int>(piece % args.pieces) * kUnit;
  const int out_block = (group * kOutUnits + o) * kUnit;
  const bool is_out = out_block < args.tiles.block_out, is_in = begin + i < end;
  const int row = min(max(args.row[block], 0), args.block_rows - 1);
  const int col = min(max(args.col[block], 0), args.block_cols - 1);
  const auto block_out = static_cast<int>(args.tiles.block_out);
  const auto block_in = static_cast<int>(args.tiles.block_in);
  if (i == 0) shared.out[o] = is_out ? row * block_out + out_block : kNoFeature;
  if (o == 0) shared.in[i] = is_in ? col * block_in + in_block : kNoFeature;
  shared.to[o][i] =
      is_out && is_in ? (block * args.tiles.block_out + out_block) * args.tiles.block_in + in_block
                      : kNowhere;
}

template <class T>
class TileProduct {
  static constexpr uint32_t kAllOwned = (1u << kWarpUnits * kWarpUnits) - 1;

 public:
  __device__ TileProduct(const Args& args, Shared& shared)
      : args_(args), shared_(shared), stages_(ptx::address_of(shared.stages)) {
    const int row = lane_ % 8;  // of a matrix
    const auto chunk = [&](int unit, int second) { return (unit * 2 + second ^ row) * 16; };
    dy_ = (lane_ / 16 * 8 + row) * kOutRow + chunk(out_unit_, lane_ / 8 % 2);
    x_ = (lane_ / 8 % 2 * 8 + row) * kInRow + chunk(in_unit_, lane_ / 16) + kStageTokens * kOutRow;
  }

  // What is described in shared memory.
  __device__ void run() {
    __syncthreads();
    clear();
    owned_ == kAllOwned ? sum<true>() : sum<false>();
    store();
    __syncthreads();  // before the next tile is described
  }

 private:
  __device__ void clear() {
    owned_ = 0;
#pragma unroll
    for (int n = 0; n < kWarpUnits; ++n) {
#pragma unroll
      for (int m = 0; m < kWarpUnits; ++m) {
        const bool owned = shared_.to[out_unit_ + m][in_unit_ + n] != kNowhere;
        owned_ |= uint32_t{owned} << (n * kWarpUnits + m);
#pragma unroll
        for (int i = 0; i < 8; ++i) sums_[m][n * 2 + i / 4][i % 4] = 0;
      }
    }
  }

  // An operand on its way to shared memory. Threads side by side copy 16 bytes each of a token's
  // features, of some tokens at once.
  template <int kUnits>
  class Source {
    static constexpr int kChunks = kUnits * 2, kRows = kThreads / kChunks;
    static_assert(kRows % 8 == 0, "all rows of a thread share a swizzle");

   public:
    __device__ Source(const void* from, int64_t stride, const int* first, int features, int tokens)
        : stride_(kRows * stride) {
      const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
      const int feature = first[chunk / 2] + chunk % 2 * 8;
      from_ = static_cast<const T*>(from) + row * stride + feature;
      rows_ = feature < features ? tokens - row : 0;
      to_ = (row * kChunks + (chunk ^ row % 8)) * 16;
    }

    // The next stage of them.
    __device__ __forceinline__ void load(uint32_t to) {
#pragma unroll
      for (int i = 0; i < kStageTokens / kRows; ++i) {
        ptx::copy(to + to_ + i * kRows * kChunks * 16, from_, i * kRows < rows_);
        from_ += stride_;
      }
      rows_ -= kStageTokens;
    }

   private:
    const T* from_;
    int64_t stride_;  // of the rows of a thread
    int rows_;        // left
    uint32_t to_;     // in a stage
  };

  // What a warp multiplies at once: 16 tokens.
  struct Fragments {
    uint32_t dy[kWarpUnits][4], x[kWarpUnits][4];
  };

  template <bool kAll>
  __device__ __forceinline__ void sum() {
    const int steps = static_cast<int>(ceil_div(args_.tokens, kStageTokens));
    Source<kOutUnits> dy(args_.dy, args_.dy_stride, shared_.out, args_.out_features, args_.tokens);
    Source<kInUnits> x(args_.x, args_.x_stride, shared_.in, args_.in_features, args_.tokens);
    const auto load = [&](int step) {
      if (step < steps) {
        const uint32_t to = stages_ + step % kStages * kStageBytes;
        dy.load(to);
        x.load(to + kStageTokens * kOutRow);
      }
      ptx::commit_copies();
    };
    for (int step = 0; step < kStages - 1; ++step) load(step);
    Fragments fragments[2];  // to multiply, and on their way
    ptx::wait_for_copies<kStages - 2>();
    __syncthreads();
    read(fragments[0], 0, 0);
    for (int step = 0; step < steps; ++step) {
      load(step + kStages - 1);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (part < kParts - 1) {
          read(fragments[(part + 1) % 2], step % kStages, (part + 1) * 16);
        } else {
          ptx::wait_for_copies<kStages - 2>();
          __syncthreads();  // all have loaded the next stage, and read this one
          read(fragments[(part + 1) % 2], (step + 1) % kStages, 0);
        }
        multiply<kAll>(fragments[part % 2]);
      }
    }
  }

  __device__ __forceinline__ void read(Fragments& to, int stage, int token) const {
    // Tokens are rows in memory, and read transposed. Of dyt, matrices (m, k), (m + 8, k), (m, k
    // + 8), (m + 8, k + 8); of x, (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8).
    const uint32_t from = stages_ + stage * kStageBytes;
#pragma unroll
    for (int i = 0; i < kWarpUnits; ++i) {  // two chunks further along: swizzled, two bits
      ptx::load_matrices<true>(to.dy[i], (from + dy_ + token * kOutRow) ^ i * 32);
    }
#pragma unroll
    for (int i = 0; i < kWarpUnits; ++i) {
      ptx::load_matrices<true>(to.x[i], (from + x_ + token * kInRow) ^ i * 32);
    }
  }

  // kAll: the warp owns all that it can.
  template <bool kAll>
  __device__ __forceinline__ void multiply(const Fragments& fragments) {
#pragma unroll
    for (int n = 0; n < kWarpUnits; ++n) {
#pragma unroll
      for (int m = 0; m < kWarpUnits; m += 2) {
        // Most tiles own most: a test for each costs more than it saves, half at a time do not.
        if (!kAll && (owned_ >> (n * kWarpUnits + m) & 3) == 0) continue;
#pragma unroll
        for (int i = m; i < m + 2; ++i) {
          ptx::multiply<T>(sums_[i][n * 2], fragments.dy[i], fragments.x[n][0], fragments.x[n][1]);
          ptx::multiply<T>(sums_[i][n * 2 + 1], fragments.dy[i], fragments.x[n][2],
                           fragments.x[n][3]);
        }
      }
    }
  }

  __device__ void store() const {
    const int quad = lane_ / 4, q = lane_ % 4;
    T* values = static_cast<T*>(args_.tiles.values);
#pragma unroll
    for (int m = 0; m < kWarpUnits; ++m) {
#pragma unroll
      for (int n = 0; n < kWarpUnits; n += 2) {
        // A lane stores 8 columns: of the first unit or of the second.
        const int64_t unit = shared_.to[out_unit_ + m][in_unit_ + n + q / 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = pack<T>(sums_[m][n * 2 + i][half * 2], sums_[m][n * 2 + i][half * 2 + 1]);
          }
          transpose(words);
          if (unit == kNowhere) continue;
          T* to = values + unit + (half * 8 + quad) * args_.tiles.block_in + q % 2 * 8;
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  const Args& args_;
  Shared& shared_;
  const uint32_t stages_;
  uint32_t dy_, x_;  // where this lane reads in a stage
  const int lane_ = threadIdx.x % kWarp;
  const int out_unit_ = threadIdx.x / kWarp % kOutWarps * kWarpUnits;
  const int in_unit_ = threadIdx.x / kWarp / kOutWarps * kWarpUnits;
  uint32_t owned_ = 0;  // bit n * kWarpUnits + m
  float sums_[kWarpUnits][kWarpUnits * 2][4];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) sampled_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  TileProduct<T> product(args, shared);
  if (args.tiles.tiles != nullptr) {
    const int tiles = sm90::sampled_product::TileReader{args.tiles}.count();
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      describe_planned(args, tile, shared);
      product.run();
    }
    return;
  }
  const int64_t pieces = args.tiles.nnz * args.pieces;
  const int64_t tiles = ceil_div(pieces, kInUnits) * args.row_groups;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile / args.row_groups * kInUnits, last = min(first + kInUnits, pieces);
    for (int64_t begin = first, end; begin < last; begin = end) {
      const int32_t row = args.row[begin / args.pieces];
      for (end = begin + 1; end < last && args.row[end / args.pieces] == row;) ++end;
      describe_run(args, begin, end, static_cast<int>(tile % args.row_groups), shared);
      product.run();
    }
  }
}

}  // namespace block_sparse::cuda::sm80::sampled_product
