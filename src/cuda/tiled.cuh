// The kernels of cuda_tiled, device code: tiles in shared memory and ordinary arithmetic, for every
// dtype, block shape and size. No tensor cores.
#pragma once

#include "block_sparse/product.h"

namespace block_sparse::cuda::tiles {

constexpr int kThreads = 256;
constexpr int kChunk = 32;  // of the sum, in shared memory at once

// So much of a sum is added up on its own first: one long sum would round more than torch's, which
// in double adds up less at a time.
template <class Sum>
constexpr int kPart = sizeof(Sum) == 8 ? 8 : kChunk;

__device__ inline int64_t clamp(int64_t value, int64_t bound) {
  return min(max(value, int64_t{0}), bound);
}

// forward and grad_input: a CTA computes some tokens x some outputs of one block row (or column).
// Its blocks are taken as one long sum, some at a time where they are not deep.
constexpr int kTokens = 128;
constexpr int kTokensOfThread = 4;

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
  int64_t block_outputs, block_depth, output_stride, depth_stride;  // the strides are of a block
  int64_t strips, token_tiles;                                      // of a block; of all tokens
};

template <class T, class Value, int kOutputs>
__global__ void __launch_bounds__(kThreads) spmm_kernel(const __grid_constant__ SpmmArgs args) {
  using Sum = typename Traits<T>::Accumulate;
  constexpr int kRow = kTokens + kTokensOfThread;  // so that a warp's stores meet more banks
  constexpr int kOutputThreads = kThreads / (kTokens / kTokensOfThread);
  constexpr int kOutputsOfThread = kOutputs / kOutputThreads;
  __shared__ Sum x_tile[kChunk][kRow];
  __shared__ Sum w_tile[kChunk][kOutputs];
  __shared__ int64_t x_from[kChunk], w_from[kChunk];  // -1: outside

  const int64_t strip = blockIdx.x / args.token_tiles;
  const int64_t first_token = blockIdx.x % args.token_tiles * kTokens;
  const int64_t row = strip / args.strips, first_in_block = strip % args.strips * kOutputs;
  const int64_t begin = clamp(args.begin[row], args.nnz);
  const int64_t sum_depth = (clamp(args.begin[row + 1], args.nnz) - begin) * args.block_depth;
  const int my_tokens = threadIdx.x / kOutputThreads * kTokensOfThread;
  const int my_output = threadIdx.x % kOutputThreads;

  Sum sums[kTokensOfThread][kOutputsOfThread] = {};
  for (int64_t chunk = 0; chunk < sum_depth; chunk += kChunk) {
    __syncthreads();
    if (threadIdx.x < kChunk) {
      const int64_t at = chunk + threadIdx.x, entry = begin + at / args.block_depth;
      const int64_t in_block = at % args.block_depth;
      x_from[threadIdx.x] = w_from[threadIdx.x] = -1;
      if (at < sum_depth) {
        const int64_t line = clamp(args.line[entry], args.depth_lines - 1);
        const int64_t number =
            args.number == nullptr ? entry : clamp(args.number[entry], args.nnz - 1);
        if (line * args.block_depth + in_block < args.depth) {
          x_from[threadIdx.x] = line * args.block_depth + in_block;
          w_from[threadIdx.x] =
              number * args.block_outputs * args.block_depth + in_block * args.depth_stride;
        }
      }
    }
    __syncthreads();
    const int k = threadIdx.x % kChunk;
    for (int t = threadIdx.x / kChunk; t < kTokens; t += kThreads / kChunk) {
      const int64_t token = first_token + t;
      const bool inside = x_from[k] >= 0 && token < args.tokens;
      const T* x = static_cast<const T*>(args.x) + token * args.x_stride;
      x_tile[k][t] = inside ? load<Sum>(x[x_from[k]]) : Sum{0};
    }
    for (int i = threadIdx.x; i < kChunk * kOutputs; i += kThreads) {
      // Neighbouring threads read what is adjacent in a block.
      const bool along_depth = args.depth_stride == 1;
      const int d = along_depth ? i % kChunk : i / kOutputs;
      const int o = along_depth ? i / kChunk : i % kOutputs;
      const int64_t output = first_in_block + o;
      const bool inside = w_from[d] >= 0 && output < args.block_outputs;
      const Value* w = static_cast<const Value*>(args.values) + output * args.output_stride;
      w_tile[d][o] = inside ? load<Sum>(w[w_from[d]]) : Sum{0};
    }
    __syncthreads();
    for (int from = 0; from < kChunk; from += kPart<Sum>) {
      Sum part[kTokensOfThread][kOutputsOfThread] = {};
#pragma unroll 8
      for (int d = from; d < from + kPart<Sum>; ++d) {
        Sum x[kTokensOfThread];
#pragma unroll
        for (int t = 0; t < kTokensOfThread; ++t) x[t] = x_tile[d][my_tokens + t];
#pragma unroll
        for (int o = 0; o < kOutputsOfThread; ++o) {
          const Sum w = w_tile[d][my_output + o * kOutputThreads];
#pragma unroll
          for (int t = 0; t < kTokensOfThread; ++t) part[t][o] += x[t] * w;
        }
      }
#pragma unroll
      for (int t = 0; t < kTokensOfThread; ++t) {
#pragma unroll
        for (int o = 0; o < kOutputsOfThread; ++o) sums[t][o] += part[t][o];
      }
    }
  }

#pragma unroll
  for (int o = 0; o < kOutputsOfThread; ++o) {
    const int64_t in_block = first_in_block + my_output + o * kOutputThreads;
    const int64_t output = row * args.block_outputs + in_block;
    if (in_block >= args.block_outputs || output >= args.outputs) continue;
    const Sum bias =
        args.bias == nullptr ? Sum{0} : load<Sum>(static_cast<const T*>(args.bias)[output]);
    Sum scale = 1;
    if constexpr (std::is_same_v<Value, int8_t>) scale = args.scales[output];
#pragma unroll
    for (int t = 0; t < kTokensOfThread; ++t) {
      const int64_t token = first_token + my_tokens + t;
      if (token >= args.tokens) continue;
      static_cast<T*>(args.y)[token * args.y_stride + output] = store<T>(scale * sums[t][o] + bias);
    }
  }
}

// grad_weight: a CTA computes kSide x kSide of one block. Its threads are an 8 x 8 grid, several
// times over, for a share of the tokens each.
constexpr int kGrid = 8;
constexpr int kShares = kThreads / (kGrid * kGrid);

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

template <class T, int kSide>
__global__ void __launch_bounds__(kThreads) sddmm_kernel(const __grid_constant__ SddmmArgs args) {
  using Sum = typename Traits<T>::Accumulate;
  constexpr int kOfThread = kSide / kGrid;  // a side
  __shared__ Sum dy_tile[kChunk][kSide], x_tile[kChunk][kSide];
  __shared__ Sum shares[kShares][kSide][kSide];

  const int64_t tiles = args.out_tiles * args.in_tiles, block = blockIdx.x / tiles;
  const int64_t tile = blockIdx.x % tiles;
  const int64_t first_n = tile / args.in_tiles * kSide, first_k = tile % args.in_tiles * kSide;
  const int64_t out = clamp(args.row[block], args.block_rows - 1) * args.block_out + first_n;
  const int64_t in = clamp(args.col[block], args.block_cols - 1) * args.block_in + first_k;
  const auto outputs = min(args.block_out - first_n, args.out_features - out);
  const auto inputs = min(args.block_in - first_k, args.in_features - in);
  const int share = threadIdx.x / (kGrid * kGrid);
  const int my_n = threadIdx.x / kGrid % kGrid, my_k = threadIdx.x % kGrid;

  Sum sums[kOfThread][kOfThread] = {};
  for (int64_t first = 0; first < args.tokens; first += kChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kChunk * kSide; i += kThreads) {
      const int64_t token = first + i / kSide;
      const int f = i % kSide;
      const T* dy = static_cast<const T*>(args.dy) + token * args.dy_stride + out;
      const T* x = static_cast<const T*>(args.x) + token * args.x_stride + in;
      const bool inside = token < args.tokens;
      dy_tile[i / kSide][f] = inside && f < outputs ? load<Sum>(dy[f]) : Sum{0};
      x_tile[i / kSide][f] = inside && f < inputs ? load<Sum>(x[f]) : Sum{0};
    }
    __syncthreads();
    Sum part[kOfThread][kOfThread] = {};
#pragma unroll
    for (int t = 0; t < kChunk; t += kShares) {
#pragma unroll
      for (int n = 0; n < kOfThread; ++n) {
#pragma unroll
        for (int k = 0; k < kOfThread; ++k) {
          part[n][k] += dy_tile[t + share][my_n + n * kGrid] * x_tile[t + share][my_k + k * kGrid];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kOfThread; ++n) {
#pragma unroll
      for (int k = 0; k < kOfThread; ++k) sums[n][k] += part[n][k];
    }
  }

#pragma unroll
  for (int n = 0; n < kOfThread; ++n) {
#pragma unroll
    for (int k = 0; k < kOfThread; ++k) {
      shares[share][my_n + n * kGrid][my_k + k * kGrid] = sums[n][k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide; i += kThreads) {
    const int n = i / kSide, k = i % kSide;
    if (first_n + n >= args.block_out || first_k + k >= args.block_in) continue;
    Sum sum = 0;
    for (int s = 0; s < kShares; ++s) sum += shares[s][n][k];
    static_cast<T*>(
        args.values)[(block * args.block_out + first_n + n) * args.block_in + first_k + k] =
        store<T>(sum);
  }
}

}  // namespace block_sparse::cuda::tiles
