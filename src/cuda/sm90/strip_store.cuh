// From the sums of a strip kernel to the output: bias, rounding, and nothing that lies outside.
#pragma once

#include <type_traits>

#include "cuda/fragment.cuh"
#include "cuda/sm90/factors.cuh"
#include "cuda/sm90/strip_fragment.cuh"
#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

// The bias of output i * 8 + lane / 4 of a strip that begins with `first`.
template <class T>
__device__ __forceinline__ float bias_of(const Params& params, int first, int i, int lane) {
  const int output = first + i * 8 + lane / 4;
  if (params.bias == nullptr || output >= params.outputs) return 0;
  return load<float>(static_cast<const T*>(params.bias)[output]);
}

// Stores a strip's results, of 16 bits, by way of shared memory: as the warps have them, only 16
// outputs of a token lie side by side, and a store takes by the row. The strips of a piece are of
// two warps, or of one; they meet, and each takes half of the tokens.
template <Config kConfig>
class StagedStore {
 public:
  using T = Output<kConfig>;
  static constexpr int kWidth = kConfig.piece.outputs;
  static constexpr int kWarps = kWidth / kWarpOutputs;
  static constexpr int kRowChunks = kWidth / 8;  // of 16 bytes, which is what a lane stores
  static constexpr int kLaneRows = 32 / kRowChunks;
  static constexpr int kLineRows = 128 / (kWidth * 2);
  static constexpr int kStagingBytes = Sizes<kConfig>::kStagingBytes;

  // The piece begins with output `first`, which may lie outside, this warp's strip is its
  // `strip`-th. `end`: of the tokens.
  __device__ __forceinline__ StagedStore(const Params& params, Shared<kConfig>& shared, int first,
                                         int strip, int token, int end, int lane)
      : pair_(static_cast<int>(threadIdx.x) / (32 * kWarps)),
        staging_(ptx::address_of(shared.staging[pair_])) {
    // Lane i names row i % 8 of matrix i / 8: of (eight tokens, eight outputs).
    put_ = offset_of(lane / 16 * 8 + lane % 8, strip * 2 + lane / 8 % 2);
    const int row = strip * kLaneRows * (kWarps - 1) + lane / kRowChunks, chunk = lane % kRowChunks;
    get_ = offset_of(row, chunk);
    const int output = first + chunk * 8;
    left_ = output < params.outputs ? end - token - row : 0;
    to_ = static_cast<uint16_t*>(params.output) + (token + row) * params.output_stride + output;
    step_ = params.output_stride * kStoreTokens;
    if (params.bias == nullptr) return;
    has_bias_ = true;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bias_[i] = bias_of<T>(params, first + strip * kWarpOutputs, i, lane);
  }

  // The sums of kEights times eight tokens become results. Before they are stored, since most have
  // no bias.
  template <int kEights>
  __device__ __forceinline__ void finish(float* sums) const {
    if (!has_bias_) return;
#pragma unroll
    for (int i = 0; i < kEights * 4; ++i) sums[i] += bias_[i / 2 % 2];
  }

  // The next tokens, the j-th of as many. Takes turns at two buffers: then a warp that is slower
  // still reads one while the other is written.
  __device__ __forceinline__ void put(const float* sums, int j, uint32_t& buffer) {
    buffer ^= kStagingBytes;
    ptx::store_matrices_transposed(staging_ + buffer + put_, pack<T>(sums[0], sums[1]),
                                   pack<T>(sums[2], sums[3]), pack<T>(sums[4], sums[5]),
                                   pack<T>(sums[6], sums[7]));
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      ptx::meet<32 * kWarps>(1 + pair_);
    }
    const uint4 eight = ptx::load_shared(staging_ + buffer + get_);
    if (j * kStoreTokens < left_) __stcs(reinterpret_cast<uint4*>(to_), eight);
    to_ += step_;
  }

 private:
  // Of 16 bytes of a token, swizzled so that neither way meets a bank twice.
  __device__ static uint32_t offset_of(int token, int chunk) {
    return token * (kWidth * 2) + ((chunk ^ token / kLineRows % kRowChunks) << 4);
  }

  int pair_;
  uint32_t staging_, put_, get_;
  int left_;  // tokens, from this lane's first one on
  bool has_bias_ = false;
  float bias_[2];
  uint16_t* to_;
  int64_t step_;
};

// Stores a strip's results in float as the warps have them: eight outputs of a token are the 32
// bytes in which memory is written.
template <Config kConfig>
class DirectStore {
 public:
  __device__ __forceinline__ DirectStore(const Params& params, Shared<kConfig>&, int first,
                                         int strip, int token, int end, int lane)
      : factors_(params.factors), stride_(params.output_stride) {
    const int output = first + strip * kWarpOutputs + lane / 4;
    token += lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      bias_[i] = bias_of<float>(params, first + strip * kWarpOutputs, i, lane);
      left_[i] = output + i * 8 < params.outputs ? end - token : 0;
    }
    to_ = static_cast<float*>(params.output) + token * stride_ + output;
  }

  template <int kEights>
  __device__ __forceinline__ void finish(float* sums) const {
#pragma unroll
    for (int i = 0; i < kEights * 4; ++i) sums[i] = factors_.times(sums[i]) + bias_[i / 2 % 2];
  }

  __device__ __forceinline__ void put(const float* sums, int j, uint32_t&) {
#pragma unroll
    for (int eight = 0; eight < 2; ++eight) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int token = eight * 8 + t;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (j * kStoreTokens + token < left_[i]) {
            __stcs(to_ + token * stride_ + i * 8, sums[(eight * 2 + i) * 2 + t]);
          }
        }
      }
    }
    to_ += kStoreTokens * stride_;
  }

 private:
  Factors<float> factors_;
  float bias_[2];
  int left_[2];  // tokens of its outputs, from this lane's first one on
  int64_t stride_;
  float* to_;
};

template <Config kConfig>
using StripStore = std::conditional_t<std::is_same_v<Output<kConfig>, float>, DirectStore<kConfig>,
                                      StagedStore<kConfig>>;

}  // namespace block_sparse::cuda::sm90::strips
