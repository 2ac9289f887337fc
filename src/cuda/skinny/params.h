// Params: a few-token product as its kernel sees it, with outputs and depth instead of the names of
// the two products; and how its units are split. Sums of block rows that several CTAs share go
// through workspace.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "block_sparse/host_device.h"

namespace block_sparse::cuda::skinny {

// Divides by what the host knows: a division takes a tenth of a microsecond, and a kernel cannot
// begin to read before it has done several.
class Divider {
 public:
  Divider() = default;
  explicit Divider(int divisor)
      : divisor_(divisor),
        shift_(std::bit_width(static_cast<unsigned>(divisor - 1)) + 31),
        factor_(
            static_cast<uint32_t>(((uint64_t{1} << shift_) + static_cast<unsigned>(divisor) - 1) /
                                  static_cast<unsigned>(divisor))) {}

  // Of 0 <= number < 2^31.
  BLOCK_SPARSE_HOST_DEVICE int quotient(int number) const {
    return static_cast<int>((uint64_t{factor_} * static_cast<unsigned>(number)) >> shift_);
  }
  BLOCK_SPARSE_HOST_DEVICE int divisor() const { return divisor_; }

 private:
  int divisor_ = 1;
  int shift_ = 31;
  uint32_t factor_ = 1u << 31;
};

// Two sums of a row that several CTAs share, and whose they are.
struct alignas(16) Part {
  float x, y;
  uint64_t tag;
};

struct Params {
  const void* values;
  // By entry, an entry being a present block in the order of the outputs. Whatever these say, it
  // is clamped: nobody has looked at them.
  const int32_t* blocks;         // the block of an entry; null: entry i is block i
  const int32_t* depth_blocks;   // where an entry lies along the depth
  const int32_t* output_blocks;  // by block, not entry: where it lies along the outputs
  const int32_t* starts;         // [output_grid + 1], first entry of each
  const void* x;                 // [tokens, depth]
  const float* scales;           // [outputs], where values are int8
  const void* bias;              // [outputs], or null
  void* output;                  // [tokens, outputs]
  int64_t x_stride;
  int64_t output_stride;
  int64_t block_size;  // elements
  int tokens;
  int outputs;
  int depth;
  int nnz;
  int output_grid;  // blocks along the outputs
  int depth_grid;
  int block_outputs;
  int block_depth;
  int block_pitch;      // elements between two rows of a block as stored
  int strips;           // of a block that a CTA has: kOutputs outputs each
  int prefetch_bytes;   // of W, for each warp, while the kernel before ends
  int units;            // of one strip of all blocks: nnz * depth_units
  Divider depth_units;  // of a strip: kDepth inputs each
  Divider teams;
  Divider team_ctas;
  Divider warps_per_strip;
  uint64_t launch;  // even, and of no other launch: see exchange.cuh
  Part* parts;
};

struct Range {
  int begin;
  int end;
};

// Equal shares; the first ones take one more each, where it does not come out even.
BLOCK_SPARSE_HOST_DEVICE inline Range share_of(Range range, int index, Divider shares) {
  const int size = shares.quotient(range.end - range.begin);
  const int larger = range.end - range.begin - size * shares.divisor();
  const int begin = range.begin + index * size + (index < larger ? index : larger);
  return {begin, begin + size + (index < larger ? 1 : 0)};
}

// What a CTA has: the units of its team, of each block strips from `strip` on.
struct Work {
  BLOCK_SPARSE_HOST_DEVICE Work(const Params& params, int cta) {
    const int team = params.team_ctas.quotient(cta);
    units = share_of({0, params.units}, team, params.teams);
    strip = (cta - team * params.team_ctas.divisor()) * params.strips;
  }

  Range units;
  int strip;
};

}  // namespace block_sparse::cuda::skinny
