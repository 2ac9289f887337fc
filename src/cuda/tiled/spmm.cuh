// forward and grad_input of cuda_tiled. A CTA computes some tokens x some outputs of one block row
// (or column); its blocks are taken as one long sum, of which a chunk at a time is in shared memory
// while the next one is copied. Device code.
#pragma once

#include "cuda/tiled/copy.cuh"

namespace block_sparse::cuda::tiles {

struct SpmmArgs {
  const void* x;  // dy, in grad_input
  const void* values;
  const float* scales;  // of the outputs, where values are int8
  const void* bias;     // or null
  void* y;
  int64_t x_stride, y_stride;
  const int32_t* begin;   // [lines + 1]
  const int32_t* line;    // [nnz]
  const int32_t* number;  // [nnz], or null: in order
  int64_t nnz, tokens, outputs, depth, depth_lines;
  int64_t block_outputs, block_depth, pitch;  // pitch: elements between the rows of a block
  int64_t strips, token_tiles;                // of a block; of all tokens
};

// A row of shared memory is 128 bytes of the depth, in which the units of 16 bytes are swizzled:
// the rows that are read at once lie in different banks.
constexpr int kRowBytes = 128;
template <class T>
constexpr int kChunk = kRowBytes / static_cast<int>(sizeof(T));

// A thread computes some tokens x a quarter of the outputs; a warp, 8 threads along the tokens.
constexpr int kTokenLanes = 8, kOutputLanes = kWarp / kTokenLanes;
template <int kTokensOfThread>
constexpr int kTileTokens = kTokensOfThread * kTokenLanes * (kThreads / kWarp);

template <int kOutputs, int kTokensOfThread>
constexpr int kSpmmBytes = 2 * (kTileTokens<kTokensOfThread> + kOutputs) * kRowBytes;

// Value: T, or int8_t, which is widened to T on its way to shared memory.
template <class T, class Value, bool kTransposed, bool kWide, int kOutputs, int kTokensOfThread>
class SpmmTile {
  static constexpr bool kScaled = std::is_same_v<Value, int8_t>;
  static_assert(!(kScaled && kTransposed), "int8 values are for forward");
  using Sum = typename Traits<T>::Accumulate;
  static constexpr int kOfUnit = kUnit<T, kWide>, kBytes = kOfUnit * sizeof(T);
  static constexpr int kTokens = kTileTokens<kTokensOfThread>;
  static constexpr int kOutputsOfThread = kOutputs / kOutputLanes;
  static constexpr int kXBytes = kTokens * kRowBytes, kStageBytes = kXBytes + kOutputs * kRowBytes;

 public:
  __device__ SpmmTile(const SpmmArgs& args, char* shared) : args_(args), shared_(shared) {
    const int64_t strip = blockIdx.x / args.token_tiles, row = strip / args.strips;
    first_token_ = blockIdx.x % args.token_tiles * kTokens;
    first_in_block_ = strip % args.strips * kOutputs;
    first_output_ = row * args.block_outputs + first_in_block_;
    begin_ = clamp(args.begin[row], args.nnz);
    const int64_t blocks = clamp(clamp(args.begin[row + 1], args.nnz) - begin_, args.depth_lines);
    sum_depth_ = static_cast<int>(blocks * args.block_depth);
  }

  __device__ void run() {
    copy_chunk(0, 0);
    for (int first = 0, stage = 0; first < sum_depth_; first += kChunk<T>, stage ^= 1) {
      wait_for_copies();
      __syncthreads();  // and nobody reads the other stage any more
      copy_chunk(first + kChunk<T>, stage ^ 1);
      multiply(stage);
    }
    store_sums();
  }

 private:
  // What a place along the long sum means.
  struct Place {
    int64_t depth;   // in x
    int64_t values;  // the first element of it in the strip
    bool inside;
  };
  __device__ Place place_of(int at) const {
    const auto block_depth = static_cast<uint32_t>(args_.block_depth);
    const int64_t entry = begin_ + at / block_depth, in_block = at % block_depth;
    if (at >= sum_depth_) return {0, 0, false};
    const int64_t line = clamp(__ldg(args_.line + entry), args_.depth_lines - 1);
    const int64_t number =
        args_.number == nullptr ? entry : clamp(__ldg(args_.number + entry), args_.nnz - 1);
    const int64_t depth = line * block_depth + in_block;
    const int64_t block = number * args_.block_outputs * block_depth;
    const int64_t from = kTransposed ? in_block * args_.pitch + first_in_block_
                                     : first_in_block_ * args_.pitch + in_block;
    return {depth, block + from, depth < args_.depth};
  }

  __device__ void copy_chunk(int first, int stage) {
    if (first >= sum_depth_) return;
    constexpr int kUnits = kChunk<T> / kOfUnit, kStep = kThreads / kUnits;
    static_assert(kStep > 0 && kTokens % kStep == 0);
    char* x_to = shared_ + stage * kStageBytes;
    char* w_to = x_to + kXBytes;
    const int at = threadIdx.x % kUnits * kOfUnit, first_row = threadIdx.x / kUnits;
    const Place place = place_of(first + at);
    const T* x = static_cast<const T*>(args_.x) + place.depth;
#pragma unroll 8
    for (int row = first_row; row < kTokens; row += kStep) {
      const int64_t token = first_token_ + row;
      copy<kBytes>(x_to + place_of_x(row, at), x + token * args_.x_stride,
                   place.inside && token < args_.tokens);
    }
    const Value* values = static_cast<const Value*>(args_.values);
    const int64_t outputs = args_.block_outputs - first_in_block_;
    if constexpr (kTransposed) {
      // As in memory: rows of outputs.
      constexpr int kRowUnits = kOutputs / kOfUnit;
      for (int i = threadIdx.x; i < kChunk<T> * kRowUnits; i += kThreads) {
        const int row = i / kRowUnits, output = i % kRowUnits * kOfUnit;
        const Place of_row = place_of(first + row);
        copy<kBytes>(w_to + (row * kOutputs + output) * sizeof(T), values + of_row.values + output,
                     of_row.inside && output < outputs);
      }
    } else {
      for (int row = first_row; row < kOutputs; row += kStep) {
        const Value* from = values + place.values + row * args_.pitch;
        const bool inside = place.inside && row < outputs;
        if constexpr (kScaled) {
#pragma unroll
          for (int i = 0; i < kOfUnit; ++i) {
            *reinterpret_cast<T*>(w_to + place_of_w(row, at + i)) =
                store<T>(inside ? load<Sum>(from[i]) : Sum{0});
          }
        } else {
          copy<kBytes>(w_to + place_of_w(row, at), from, inside);
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
    const char* x_from = shared_ + stage * kStageBytes;
    const char* w_from = x_from + kXBytes;
#pragma unroll 1
    for (int at = 0; at < kChunk<T>; at += kPart<Sum>) {
      Sum part[kTokensOfThread][kOutputsOfThread] = {};
#pragma unroll 2
      for (int d = 0; d < kPart<Sum>; d += kRead<T>) multiply_step(part, x_from, w_from, at + d);
      add(sums_, part);
    }
  }

  __device__ __forceinline__ void multiply_step(Sum (&sums)[kTokensOfThread][kOutputsOfThread],
                                                const char* x_from, const char* w_from, int at) {
    Sum x[kTokensOfThread][kRead<T>];
#pragma unroll
    for (int t = 0; t < kTokensOfThread; ++t) {
      read<T>(x[t], x_from + place_of_x(first_row_ + t * kTokenLanes, at));
    }
    if constexpr (kTransposed) {
#pragma unroll
      for (int d = 0; d < kRead<T>; ++d) {
        Sum w[kOutputsOfThread], column[kTokensOfThread];
        read<T>(w, w_from + ((at + d) * kOutputs + my_outputs_) * sizeof(T));
#pragma unroll
        for (int t = 0; t < kTokensOfThread; ++t) column[t] = x[t][d];
        add_product(sums, column, w);
      }
    } else {
#pragma unroll
      for (int o = 0; o < kOutputsOfThread; ++o) {
        Sum w[kRead<T>];
        read<T>(w, w_from + place_of_w(my_outputs_ + o, at));
#pragma unroll
        for (int d = 0; d < kRead<T>; ++d) {
#pragma unroll
          for (int t = 0; t < kTokensOfThread; ++t) sums[t][o] += x[t][d] * w[d];
        }
      }
    }
  }

  // Where an element lies in a stage of x, and of W in rows of the depth.
  static __device__ __forceinline__ int place_of_x(int row, int at) {
    return swizzled(row, at, row % kTokenLanes);
  }
  static __device__ __forceinline__ int place_of_w(int row, int at) {
    return swizzled(row, at, row / kOutputsOfThread);
  }
  static __device__ __forceinline__ int swizzled(int row, int at, int by) {
    constexpr int kOf16 = 16 / sizeof(T);
    return row * kRowBytes + (at / kOf16 ^ by) * 16 + at % kOf16 * sizeof(T);
  }

  __device__ void store_sums() {
    const int64_t in_block = first_in_block_ + my_outputs_, first = first_output_ + my_outputs_;
    const auto left = static_cast<int>(
        clamp(min(args_.block_outputs - in_block, args_.outputs - first), kOutputsOfThread));
    Sum bias[kOutputsOfThread] = {}, scale[kOutputsOfThread] = {};
    for (int o = 0; o < left; ++o) {
      if constexpr (kScaled) scale[o] = load<Sum>(args_.scales[first + o]);
      if (args_.bias != nullptr) {
        bias[o] = load<Sum>(static_cast<const T*>(args_.bias)[first + o]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokensOfThread; ++t) {
      const int64_t token = first_token_ + first_row_ + t * kTokenLanes;
      if (token >= args_.tokens) continue;
      T* to = static_cast<T*>(args_.y) + token * args_.y_stride + first;
      constexpr int kAtOnce = kWide && kOutputsOfThread >= kOfUnit ? kOfUnit : 1;
      struct alignas(kAtOnce * sizeof(T)) Some {
        T elements[kAtOnce];
      };
#pragma unroll
      for (int o = 0; o < kOutputsOfThread; o += kAtOnce) {
        Some some;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const Sum sum = kScaled ? scale[o + i] * sums_[t][o + i] : sums_[t][o + i];
          some.elements[i] = store<T>(sum + bias[o + i]);
        }
        if (o < left) *reinterpret_cast<Some*>(to + o) = some;
      }
    }
  }

  const SpmmArgs& args_;
  char* const shared_;
  int64_t first_token_, first_in_block_, first_output_, begin_;
  int sum_depth_;
  const int first_row_ =
      threadIdx.x / kWarp * kTokenLanes * kTokensOfThread + threadIdx.x % kTokenLanes;
  const int my_outputs_ = threadIdx.x % kWarp / kTokenLanes * kOutputsOfThread;
  Sum sums_[kTokensOfThread][kOutputsOfThread] = {};
};

template <class T, class Value, bool kTransposed, bool kWide, int kOutputs, int kTokensOfThread>
__global__ void __launch_bounds__(kThreads, 2) spmm_kernel(const __grid_constant__ SpmmArgs args) {
  extern __shared__ __align__(128) char shared[];
  SpmmTile<T, Value, kTransposed, kWide, kOutputs, kTokensOfThread>(args, shared).run();
}

}  // namespace block_sparse::cuda::tiles
