// The op zero_blocks_: checks its tensors and hands their memory to the device.
#include "binding.h"
#include "block_sparse/check.h"

namespace block_sparse::binding {

void zero_blocks(const std::vector<Tensor>& values, const std::vector<Tensor>& blocks) {
  check(!values.empty() && values.size() == blocks.size(), "blocks: has ", blocks.size(),
        " tensors, values has ", values.size(), "; there must be one of each, or more");
  std::vector<BlocksToZero> tensors;
  tensors.reserve(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor &tensor = values[i], &which = blocks[i];
    check(tensor.dim() == 3 && tensor.is_contiguous(),
          "values: must be contiguous [nnz, block_out, block_in], got ", describe(tensor));
    check_same_device("values", tensor, "the first of them", values[0]);
    const int64_t bytes =
        tensor.size(1) * tensor.size(2) * static_cast<int64_t>(tensor.element_size());
    const int64_t* numbers = block_numbers(which, values[0]);
    tensors.push_back({tensor.mutable_data_ptr(), numbers, tensor.size(0), bytes, which.numel()});
  }
  Device::zero_blocks(tensors, values[0]);
}

}  // namespace block_sparse::binding
