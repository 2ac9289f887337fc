// Between torch and the core: checks tensors, makes views of them, and calls dispatch. Compiled
// once into each of the two libraries; what differs between CPU and CUDA is the functions that
// `Device` names.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "block_sparse/product.h"
#include "blocks_to_zero.h"

namespace block_sparse::binding {

using torch::stable::Tensor;

// What a library knows of its device; defined in cpu.cpp and in cuda.cpp.
struct Device {
  static Backend backend();
  // The threads or the stream to run on.
  static Execution execution(const Tensor& tensor);
  // Called for a new output, before its memory is used.
  static void will_write(const Tensor& output);
  // Completes the description by what the execution lends.
  static void describe(ProductDesc& desc);
  // Memory safety of the indices: checked on the CPU; on a GPU the kernels clamp instead, since
  // looking would need a synchronisation.
  static void check_index(const PatternView& pattern);
  // What kernels of this device plan once per pattern follows its indices: int32 entries of it, and
  // the pattern with it.
  static int64_t walks_size(GridShape grid, BlockShape block);
  static void attach_walks(PatternView& pattern, BlockShape block, const int32_t* walks);
  static void build_walks(const PatternView& pattern, BlockShape block, int32_t* walks);
  // On the device of `like`. Entries that name no block: an error, or skipped on a GPU.
  static void zero_blocks(std::span<const BlocksToZero> tensors, const Tensor& like);
};

// The ops, with their schemas in cpu.cpp.
Tensor forward(const Tensor& input, const Tensor& values, const Tensor& index,
               const std::optional<Tensor>& bias, int64_t out_features);
Tensor forward_packed(const Tensor& input, const Tensor& packed, const Tensor& index,
                      const std::optional<Tensor>& bias, int64_t out_features, int64_t block_out,
                      int64_t block_in);
Tensor forward_int8(const Tensor& input, const Tensor& values, const Tensor& scales,
                    const Tensor& index, const std::optional<Tensor>& bias, int64_t out_features);
Tensor grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& index,
                  int64_t in_features);
Tensor grad_weight(const Tensor& grad_output, const Tensor& input, const Tensor& index, int64_t nnz,
                   int64_t block_out, int64_t block_in);
Tensor with_walks(const Tensor& index, int64_t block_rows, int64_t block_cols, int64_t nnz,
                  int64_t block_out, int64_t block_in);
void zero_blocks(const std::vector<Tensor>& values, const std::vector<Tensor>& blocks);
// Of a list of blocks by number, on the device of `like`; which blocks there are is not looked at.
const int64_t* block_numbers(const Tensor& blocks, const Tensor& like);
std::string explain(const Tensor& values, std::string product, int64_t tokens, int64_t out_features,
                    int64_t in_features, bool bias, bool packed,
                    const std::optional<Tensor>& input);

// Throws unless the dtype is one of ours.
Dtype dtype_of(const char* name, const Tensor& tensor);
torch::headeronly::ScalarType scalar_type_of(Dtype dtype);
int64_t check_block(const char* name, int64_t value);
// Of values [nnz, block_out, block_in]; of packed ones [nnz, block_out * block_in].
BlockShape block_shape_of(const Tensor& values);
BlockShape block_shape_of_packed(const Tensor& packed, int64_t block_out, int64_t block_in);
// Itself where it is contiguous: asking torch costs a trip through its dispatcher.
Tensor as_contiguous(const Tensor& tensor);
// Throws unless `tensor` is a contiguous int32 tensor of one dimension.
void check_index_tensor(const char* name, const Tensor& tensor);
void check_same_device(const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other);

// For messages: "Float [3, 64]", "cuda:0". Functions of nothing: only a message that is needed is
// made.
std::string description(const Tensor& tensor);
std::string device_name(const Tensor& tensor);
inline auto describe(const Tensor& tensor) {
  return [&tensor] { return description(tensor); };
}
inline auto device_of(const Tensor& tensor) {
  return [&tensor] { return device_name(tensor); };
}

}  // namespace block_sparse::binding
