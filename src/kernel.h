// Kernel: the one interface that every implementation of a product has, and the lists of them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "block_sparse/product.h"

namespace block_sparse {

// Why a kernel does not take a product, as a sentence with the values; nothing if it does.
using Refusal = std::optional<std::string>;

// Values that were made for serving are read in forward only; every kernel that takes them asks.
inline Refusal why_not_served(const ProductDesc& desc) {
  if (desc.product == Product::forward || !(desc.packed || desc.int8)) return std::nullopt;
  return "reads " + std::string(desc.packed ? "packed" : "int8") +
         " values in forward only, not in " + std::string(to_string(desc.product));
}

struct Kernel {
  std::string_view name;
  Refusal (*why_not)(const ProductDesc& desc);
  // Bytes; may depend on the number of threads.
  int64_t (*workspace)(const ProductDesc& desc, const Execution& execution);
  // Allocates nothing, synchronises nothing; the caller has checked the arguments.
  void (*run)(const ProductDesc& desc, const ProductArgs& args, const Execution& execution);
};

// In order of preference; the last accepts everything. Dispatch, tests and benchmarks use this
// list. A library holds the lists of the backends that it was built with; others are empty.
std::span<const Kernel> kernels(Backend backend);

}  // namespace block_sparse
