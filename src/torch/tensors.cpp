// Tensors: what every op asks of one before it takes its memory, and how messages name it. Knows
// nothing of products.
#include <limits>

#include "binding.h"
#include "block_sparse/check.h"

namespace block_sparse::binding {

using torch::headeronly::ScalarType;

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      throw Error(concat(name, ": dtype must be float64, float32, bfloat16 or float16, got ",
                         torch::headeronly::toString(tensor.scalar_type())));
  }
}

ScalarType scalar_type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return ScalarType::Double;
    case Dtype::f32:
      return ScalarType::Float;
    case Dtype::bf16:
      return ScalarType::BFloat16;
    case Dtype::f16:
      return ScalarType::Half;
  }
  __builtin_unreachable();
}

int64_t check_block(const char* name, int64_t value) {
  check(value >= 1 && value <= std::numeric_limits<int32_t>::max(), name,
        ": a block must have at least one element and fewer than 2^31 in each direction, got ",
        value);
  return value;
}

BlockShape block_shape_of(const Tensor& values) {
  check(values.dim() == 3, "values: must be [nnz, block_out, block_in], got ", describe(values));
  return {check_block("values", values.size(1)), check_block("values", values.size(2))};
}

BlockShape block_shape_of_packed(const Tensor& packed, int64_t block_out, int64_t block_in) {
  const BlockShape block{check_block("block_out", block_out), check_block("block_in", block_in)};
  check(
      packed.dim() == 2 && packed.size(1) / block_in == block_out && packed.size(1) % block_in == 0,
      "packed: must be [nnz, ", block_out, " * ", block_in, "], got ", describe(packed));
  return block;
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

void check_index_tensor(const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Int && tensor.dim() == 1 && tensor.is_contiguous(),
        name, ": must be a contiguous int32 tensor of one dimension, got ", describe(tensor));
}

std::string description(const Tensor& tensor) {
  std::string sizes;
  for (int64_t size : tensor.sizes()) sizes += concat(sizes.empty() ? "" : ", ", size);
  return concat(tensor.is_contiguous() ? "" : "strided ",
                torch::headeronly::toString(tensor.scalar_type()), " [", sizes, "]");
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return concat("cuda:", tensor.get_device_index());
  return "a device that is neither cpu nor cuda";
}

void check_same_device(const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) {
  check(tensor.is_cpu() == other.is_cpu() && tensor.is_cuda() == other.is_cuda() &&
            tensor.get_device_index() == other.get_device_index(),
        name, ": is on ", device_of(tensor), ", but ", other_name, " on ", device_of(other));
}

const int64_t* block_numbers(const Tensor& blocks, const Tensor& like) {
  check(blocks.dim() == 1 && blocks.is_contiguous() &&
            blocks.scalar_type() == torch::headeronly::ScalarType::Long,
        "blocks: must be contiguous int64 [n], got ", describe(blocks));
  check_same_device("blocks", blocks, "values", like);
  return static_cast<const int64_t*>(blocks.const_data_ptr());
}

}  // namespace block_sparse::binding
