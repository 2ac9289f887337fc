// Level: what one instruction set level offers. The kernels are compiled once per level and chosen
// at run time: by what the machine has, or by the environment variable BLOCK_SPARSE_ISA.
#pragma once

#include <string_view>

#include "block_sparse/product.h"

namespace block_sparse::cpu {

struct Level {
  std::string_view name;
  bool (*supported)();  // by this machine
  // As in Kernel, for every product.
  int64_t (*workspace)(const ProductDesc& desc, const Execution& execution);
  void (*run)(const ProductDesc& desc, const ProductArgs& args, const Execution& execution);
};

// The best level that the machine supports, or the one that BLOCK_SPARSE_ISA names. Throws if there
// is no such level, or the machine lacks it.
const Level& level();

}  // namespace block_sparse::cpu
