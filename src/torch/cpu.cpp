// The library _C: the schemas of all ops, and their CPU side.
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "binding.h"
#include "block_sparse/check.h"
#include "block_sparse/packed.h"

namespace block_sparse::binding {

Backend Device::backend() { return Backend::cpu; }

Execution Device::execution(const Tensor&) {
  Execution execution;
  execution.parallel_for = [](int64_t count, Execution::Body body, const void* context) {
    torch::stable::parallel_for(0, count, 1,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  execution.threads = static_cast<int>(torch::stable::get_num_threads());
  return execution;
}

// glibc maps what is larger than 32 MB anew each time, and a fault for each 4 KB of an output takes
// as long as a tenth of a sparse product: pages of 2 MB are asked for, where the system gives them
// to those who ask. Where it does not, or another allocator keeps the memory, little changes.
void Device::will_write([[maybe_unused]] const Tensor& output) {
#ifdef __linux__
  constexpr uintptr_t kMapped = 32 << 20, kPage = 2 << 20;
  const auto bytes = static_cast<uintptr_t>(output.numel()) * output.element_size();
  if (bytes < kMapped) return;
  const auto address = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void Device::describe(ProductDesc&) {}

int64_t Device::walks_size(GridShape, BlockShape) { return 0; }

void Device::attach_walks(PatternView&, BlockShape, const int32_t*) {}

void Device::build_walks(const PatternView&, BlockShape, int32_t*) {}

void Device::check_index(const PatternView& pattern) { check_bounds(pattern); }

void Device::zero_blocks(std::span<const BlocksToZero> tensors, const Tensor&) {
  for (const BlocksToZero& tensor : tensors) {
    for (const int64_t block : std::span(tensor.blocks, static_cast<size_t>(tensor.count))) {
      check(block >= 0 && block < tensor.nnz, "blocks: there is no block ", block, " in ",
            tensor.nnz, " of them");
    }
  }
  for (const BlocksToZero& tensor : tensors) {
    for (const int64_t block : std::span(tensor.blocks, static_cast<size_t>(tensor.count))) {
      std::memset(static_cast<char*>(tensor.values) + block * tensor.block_bytes, 0,
                  static_cast<size_t>(tensor.block_bytes));
    }
  }
}

namespace {

using torch::headeronly::ScalarType;

Tensor to_tensor(const Pattern& pattern) {
  const auto packed = pattern.packed();
  Tensor index = torch::stable::empty({static_cast<int64_t>(packed.size())}, ScalarType::Int);
  std::copy(packed.begin(), packed.end(), static_cast<int32_t*>(index.mutable_data_ptr()));
  return index;
}

std::span<const int32_t> span_of(const Tensor& tensor) {
  return {static_cast<const int32_t*>(tensor.const_data_ptr()),
          static_cast<size_t>(tensor.numel())};
}

Tensor index_from_bsr(const Tensor& crow_indices, const Tensor& col_indices, int64_t block_cols) {
  check_index_tensor("crow_indices", crow_indices);
  check_index_tensor("col_indices", col_indices);
  return to_tensor(Pattern::from_bsr(span_of(crow_indices), span_of(col_indices), block_cols));
}

Tensor index_from_mask(const Tensor& mask) {
  check(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2,
        "mask: must be a bool tensor [block_rows, block_cols], got ", describe(mask));
  const Tensor rows = torch::stable::contiguous(mask);
  return to_tensor(Pattern::from_mask(
      {static_cast<const uint8_t*>(rows.const_data_ptr()), static_cast<size_t>(rows.numel())},
      rows.size(0), rows.size(1)));
}

Tensor index_from_blocks(const Tensor& blocks, int64_t block_rows, int64_t block_cols) {
  check(blocks.scalar_type() == ScalarType::Long && blocks.dim() == 2 && blocks.size(1) == 2,
        "blocks: must be an int64 tensor [n, 2] of (block row, block column), got ",
        describe(blocks));
  const Tensor rows = torch::stable::contiguous(blocks);
  const auto* pairs = static_cast<const int64_t*>(rows.const_data_ptr());
  std::vector<Pattern::Block> list;
  list.reserve(static_cast<size_t>(rows.size(0)));
  for (int64_t i = 0; i < rows.size(0); ++i) list.emplace_back(pairs[2 * i], pairs[2 * i + 1]);
  return to_tensor(Pattern::from_blocks(list, block_rows, block_cols));
}

Tensor index_random(int64_t block_rows, int64_t block_cols, int64_t nnz, int64_t seed,
                    bool balanced) {
  return to_tensor(
      Pattern::random(block_rows, block_cols, nnz, static_cast<uint64_t>(seed), balanced));
}

Tensor index_banded(int64_t block_rows, int64_t block_cols, int64_t bandwidth) {
  return to_tensor(Pattern::banded(block_rows, block_cols, bandwidth));
}

Tensor pack(const Tensor& values) {
  const Dtype dtype = dtype_of("values", values);
  const BlockShape block = block_shape_of(values);
  const Tensor blocks = as_contiguous(values);
  Tensor packed = torch::stable::new_empty(values, {values.size(0), block.out * block.in});
  block_sparse::pack(dtype, block, values.size(0), blocks.const_data_ptr(),
                     packed.mutable_data_ptr());
  return packed;
}

Tensor unpack(const Tensor& packed, int64_t block_out, int64_t block_in) {
  const Dtype dtype = dtype_of("packed", packed);
  const BlockShape block = block_shape_of_packed(packed, block_out, block_in);
  const Tensor blocks = as_contiguous(packed);
  Tensor values = torch::stable::new_empty(packed, {packed.size(0), block.out, block.in});
  block_sparse::unpack(dtype, block, packed.size(0), blocks.const_data_ptr(),
                       values.mutable_data_ptr());
  return values;
}

}  // namespace
}  // namespace block_sparse::binding

namespace binding = block_sparse::binding;

STABLE_TORCH_LIBRARY(block_sparse, m) {
  // The products. `index` is the packed index of a pattern (include/block_sparse/pattern.h).
  m.def(
      "forward(Tensor input, Tensor values, Tensor index, Tensor? bias, SymInt out_features) "
      "-> Tensor");
  m.def(
      "grad_input(Tensor grad_output, Tensor values, Tensor index, SymInt in_features) "
      "-> Tensor");
  m.def(
      "grad_weight(Tensor grad_output, Tensor input, Tensor index, SymInt nnz, SymInt block_out, "
      "SymInt block_in) -> Tensor");
  // Forward from packed values (include/block_sparse/packed.h): [nnz, block_out * block_in], in the
  // order that the CPU's kernels read best. No gradients.
  m.def(
      "forward_packed(Tensor input, Tensor packed, Tensor index, Tensor? bias, "
      "SymInt out_features, SymInt block_out, SymInt block_in) -> Tensor");
  // Forward from int8 values [nnz, block_out, block_in] and float32 scales [out_features], by which
  // the outputs are multiplied. No gradients.
  m.def(
      "forward_int8(Tensor input, Tensor values, Tensor scales, Tensor index, Tensor? bias, "
      "SymInt out_features) -> Tensor");
  m.def("pack(Tensor values) -> Tensor");
  m.def("unpack(Tensor packed, SymInt block_out, SymInt block_in) -> Tensor");
  // Sets these blocks of each tensor to zero; values of any dtype, blocks int64.
  m.def("zero_blocks_(Tensor(a!)[] values, Tensor[] blocks) -> ()");
  // Sums of values * others over each block, of all tensors, one after the other. For `blocks` of
  // each, `instead` is taken for the values. On a GPU only.
  m.def(
      "block_dots(Tensor[] values, Tensor[] others, Tensor[] blocks, Tensor[] instead) -> Tensor");
  // Which kernel would run, and why: for people. Where values are int8, `input` has the dtype of
  // the rest.
  m.def(
      "explain(Tensor values, str product, int tokens, int out_features, int in_features, "
      "bool bias, bool packed=False, Tensor? input=None) -> str");
  // Packed indices of new patterns; everything is validated.
  m.def("index_from_bsr(Tensor crow_indices, Tensor col_indices, SymInt block_cols) -> Tensor");
  // An index with what the kernels of its device plan for a block shape; on the CPU that is
  // nothing.
  m.def(
      "with_walks(Tensor index, SymInt block_rows, SymInt block_cols, SymInt nnz, "
      "SymInt block_out, SymInt block_in) -> Tensor");
  m.def("index_from_mask(Tensor mask) -> Tensor");
  m.def("index_from_blocks(Tensor blocks, SymInt block_rows, SymInt block_cols) -> Tensor");
  m.def("index_random(int block_rows, int block_cols, int nnz, int seed, bool balanced) -> Tensor");
  m.def("index_banded(int block_rows, int block_cols, int bandwidth) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(block_sparse, CPU, m) {
  m.impl("forward", TORCH_BOX(&binding::forward));
  m.impl("grad_input", TORCH_BOX(&binding::grad_input));
  m.impl("grad_weight", TORCH_BOX(&binding::grad_weight));
  m.impl("forward_packed", TORCH_BOX(&binding::forward_packed));
  m.impl("forward_int8", TORCH_BOX(&binding::forward_int8));
  m.impl("pack", TORCH_BOX(&binding::pack));
  m.impl("unpack", TORCH_BOX(&binding::unpack));
  m.impl("zero_blocks_", TORCH_BOX(&binding::zero_blocks));
  m.impl("explain", TORCH_BOX(&binding::explain));
  m.impl("index_from_bsr", TORCH_BOX(&binding::index_from_bsr));
  m.impl("with_walks", TORCH_BOX(&binding::with_walks));
  m.impl("index_from_mask", TORCH_BOX(&binding::index_from_mask));
  m.impl("index_from_blocks", TORCH_BOX(&binding::index_from_blocks));
}

// No tensor among the arguments to choose a device by: the index is made on the CPU.
STABLE_TORCH_LIBRARY_IMPL(block_sparse, CompositeExplicitAutograd, m) {
  m.impl("index_random", TORCH_BOX(&binding::index_random));
  m.impl("index_banded", TORCH_BOX(&binding::index_banded));
}
