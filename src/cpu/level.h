// Level: what one instruction set level offers. The kernels are compiled once per level and chosen
// at run time: by what the machine has, or by the environment variable BLOCK_SPARSE_ISA.
#pragma once

#include <string_view>

#include "block_sparse/product.h"

namespace block_sparse::cpu {

// As in Kernel.
struct Routine {
  int64_t (*workspace)(const ProductDesc& desc, const Execution& execution);
  void (*run)(const ProductDesc& desc, const ProductArgs& args, const Execution& execution);
};

struct Level {
  std::string_view name;
  int vector_bytes;
  bool (*supported)();  // by this machine
  Routine any;          // every product
  Routine panel;        // forward and grad_input, outputs in whole vectors
  Routine few_tokens;   // forward, and grad_input in f32 and f64
};

// The best level that the machine supports, or the one that BLOCK_SPARSE_ISA names. Throws if there
// is no such level, or the machine lacks it.
const Level& level();

}  // namespace block_sparse::cpu
