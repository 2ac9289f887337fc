// grad_weight of cuda_tiled. A CTA computes a square of one block: its threads are a small grid
// over the square, several times over for a share of the tokens each; in the end the shares are
// added. Device code.
#pragma once

#include "cuda/tiled/copy.cuh"

namespace block_sparse::cuda::tiles {

struct SddmmArgs {
  const void* dy;
  const void* x;
  void* values;
  int64_t dy_stride, x_stride;
  const int32_t* row;
  const int32_t* col;
  int64_t block_rows, block_cols;
  int64_t tokens, out_features, in_features;
  int64_t block_out, block_in;
  int64_t out_tiles, in_tiles;  // of a block
};

template <int kSide>
constexpr int kGrid = kSide == 64 ? 8 : 4;  // threads along each side
template <int kSide>
constexpr int kShares = kThreads / (kGrid<kSide> * kGrid<kSide>);
// Tokens in shared memory at once; of these a share has no more than a part of a sum.
constexpr int kTokenChunk = 64;

template <class T, int kSide>
constexpr int kSddmmBytes =
    std::max<int>(4 * kTokenChunk * kSide * sizeof(T),
                  kShares<kSide> * kSide * kSide * sizeof(typename Traits<T>::Accumulate));

template <class T, bool kWide, int kSide>
class SddmmTile {
  using Sum = typename Traits<T>::Accumulate;
  static constexpr int kOfUnit = kUnit<T, kWide>, kBytes = kOfUnit * sizeof(T);
  static constexpr int kOfThread = kSide / kGrid<kSide>;  // along each side
  static constexpr int kRow = kSide * sizeof(T), kTile = kTokenChunk * kRow;
  static_assert(kTokenChunk / kShares<kSide> <= kPart<Sum>);

 public:
  __device__ SddmmTile(const SddmmArgs& args, char* shared) : args_(args), shared_(shared) {
    const int64_t tiles = args.out_tiles * args.in_tiles;
    block_ = blockIdx.x / tiles;
    const int64_t tile = blockIdx.x % tiles;
    first_n_ = tile / args.in_tiles * kSide;
    first_k_ = tile % args.in_tiles * kSide;
    out_ = clamp(args.row[block_], args.block_rows - 1) * args.block_out + first_n_;
    in_ = clamp(args.col[block_], args.block_cols - 1) * args.block_in + first_k_;
  }

  __device__ void run() {
    copy_tokens(0, 0);
    int stage = 0;
    for (int64_t first = 0; first < args_.tokens; first += kTokenChunk, stage ^= 1) {
      wait_for_copies();
      __syncthreads();  // and nobody reads the other stage any more
      copy_tokens(first + kTokenChunk, stage ^ 1);
      multiply(stage);
    }
    add_shares();
  }

 private:
  __device__ void copy_tokens(int64_t first, int stage) {
    if (first >= args_.tokens) return;
    constexpr int kUnits = kSide / kOfUnit, kStep = kThreads / kUnits;
    char* dy_to = shared_ + stage * 2 * kTile;
    char* x_to = dy_to + kTile;
    const int at = threadIdx.x % kUnits * kOfUnit;
    const bool dy_inside = at < min(args_.block_out - first_n_, args_.out_features - out_);
    const bool x_inside = at < min(args_.block_in - first_k_, args_.in_features - in_);
    const T* dy = static_cast<const T*>(args_.dy) + out_ + at;
    const T* x = static_cast<const T*>(args_.x) + in_ + at;
#pragma unroll 4
    for (int t = threadIdx.x / kUnits; t < kTokenChunk; t += kStep) {
      const int64_t token = first + t;
      const int to = t * kRow + at * static_cast<int>(sizeof(T));
      copy<kBytes>(dy_to + to, dy + token * args_.dy_stride, dy_inside && token < args_.tokens);
      copy<kBytes>(x_to + to, x + token * args_.x_stride, x_inside && token < args_.tokens);
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
    const char* dy_from = shared_ + stage * 2 * kTile + my_n_ * sizeof(T);
    const char* x_from = shared_ + (stage * 2 + 1) * kTile + my_k_ * sizeof(T);
    Sum part[kOfThread][kOfThread] = {};
#pragma unroll 4
    for (int t = share_; t < kTokenChunk; t += kShares<kSide>) {
      Sum dy[kOfThread], x[kOfThread];
      read<T>(dy, dy_from + t * kRow);
      read<T>(x, x_from + t * kRow);
      add_product(part, dy, x);
    }
    add(sums_, part);
  }

  __device__ void add_shares() {
    Sum* shares = reinterpret_cast<Sum*>(shared_);  // [kShares][kSide][kSide]
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kOfThread; ++n) {
#pragma unroll
      for (int k = 0; k < kOfThread; ++k) {
        shares[(share_ * kSide + my_n_ + n) * kSide + my_k_ + k] = sums_[n][k];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
      const int64_t n = first_n_ + i / kSide, k = first_k_ + i % kSide;
      if (n >= args_.block_out || k >= args_.block_in) continue;
      Sum sum = 0;
#pragma unroll
      for (int share = 0; share < kShares<kSide>; ++share) sum += shares[share * kSide * kSide + i];
      static_cast<T*>(args_.values)[(block_ * args_.block_out + n) * args_.block_in + k] =
          store<T>(sum);
    }
  }

  const SddmmArgs& args_;
  char* const shared_;
  int64_t block_, first_n_, first_k_, out_, in_;
  const int share_ = threadIdx.x / (kGrid<kSide> * kGrid<kSide>);
  const int my_n_ = threadIdx.x / kGrid<kSide> % kGrid<kSide> * kOfThread;
  const int my_k_ = threadIdx.x % kGrid<kSide> * kOfThread;
  Sum sums_[kOfThread][kOfThread] = {};
};

template <class T, bool kWide, int kSide>
__global__ void __launch_bounds__(kThreads) sddmm_kernel(const __grid_constant__ SddmmArgs args) {
  extern __shared__ __align__(128) char shared[];
  SddmmTile<T, kWide, kSide>(args, shared).run();
}

}  // namespace block_sparse::cuda::tiles
