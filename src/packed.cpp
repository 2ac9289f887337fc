// Values to packed order and back: once per layer, so plain loops.
#include "block_sparse/packed.h"

namespace block_sparse {
namespace {

// f(canonical index, packed index) for every element.
template <class F>
void for_each_element(Dtype dtype, BlockShape block, int64_t nnz, const F& f) {
  const PackedOrder order = packed_order(dtype, block);
  for (int64_t b = 0; b < nnz; ++b) {
    const int64_t first = b * block.out * block.in;
    for (int64_t n = 0; n < block.out; ++n) {
      for (int64_t k = 0; k < block.in; ++k) {
        f(first + n * block.in + k, first + order.offset(n, k));
      }
    }
  }
}

}  // namespace

void pack(Dtype dtype, BlockShape block, int64_t nnz, const void* values, void* packed) {
  visit(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_element(dtype, block, nnz, [&](int64_t canonical, int64_t in_order) {
      static_cast<T*>(packed)[in_order] = static_cast<const T*>(values)[canonical];
    });
  });
}

void unpack(Dtype dtype, BlockShape block, int64_t nnz, const void* packed, void* values) {
  visit(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_element(dtype, block, nnz, [&](int64_t canonical, int64_t in_order) {
      static_cast<T*>(values)[canonical] = static_cast<const T*>(packed)[in_order];
    });
  });
}

}  // namespace block_sparse
