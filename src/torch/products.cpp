// The three products as torch ops: tensors are checked here, once; kernels trust what they get.
#include <algorithm>
#include <array>
#include <bit>
#include <initializer_list>
#include <limits>
#include <span>
#include <vector>

#include "binding.h"
#include "block_sparse/check.h"
#include "block_sparse/packed.h"

namespace block_sparse::binding {
namespace {

using torch::headeronly::ScalarType;

void check_same(const char* name, const Tensor& tensor, const char* other_name,
                const Tensor& other) {
  check(dtype_of(name, tensor) == dtype_of(other_name, other), name, ": dtype is ",
        to_string(dtype_of(name, tensor)), ", but ", other_name, " has ",
        to_string(dtype_of(other_name, other)));
}

int64_t check_features(const char* name, int64_t value) {
  check(value >= 0 && value <= std::numeric_limits<int32_t>::max(), name, ": is ", value,
        "; it must be in [0, 2^31)");
  return value;
}

// The indices as a view; `grid` comes from the sizes of the other tensors.
PatternView pattern_of(const Tensor& index, const ProductDesc& desc) {
  const GridShape grid = desc.grid();
  const int64_t size = grid.index_size();
  const auto* entries = static_cast<const int32_t*>(index.const_data_ptr());
  PatternView pattern = PatternView::of_packed(entries, grid);
  if (index.numel() != size) {
    const int64_t walks = Device::walks_size(grid, desc.block);
    check(index.numel() == size + walks, "index: has ", index.numel(), " entries; ",
          grid.block_rows, " x ", grid.block_cols, " blocks with ", grid.nnz, " present need ",
          size);
    Device::attach_walks(pattern, desc.block, entries + size);
  }
  Device::check_index(pattern);
  return pattern;
}

// A dense operand [..., features] as rows. Copies only what is neither contiguous nor a matrix
// with adjacent elements; `keep` holds the copy.
struct Rows {
  Tensor keep;
  ConstDenseView view;
  int64_t count = 0;
};

// The largest power of two up to 16 of which all of these are multiples.
int64_t common_alignment(std::initializer_list<uint64_t> addresses_and_strides) {
  uint64_t bits = 16;
  for (const uint64_t value : addresses_and_strides) bits |= value;
  return int64_t{1} << std::countr_zero(bits);
}

bool is_int8(const Tensor& values) { return values.scalar_type() == ScalarType::Char; }

uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

uint64_t stride_bytes(const ConstDenseView& view, Dtype dtype) {
  return static_cast<uint64_t>(view.row_stride * size_of(dtype));
}

Rows rows_of(const char* name, const Tensor& tensor, int64_t features) {
  const int64_t dim = tensor.dim();
  check(dim >= 1, name, ": must have at least one dimension");
  check(tensor.size(dim - 1) == features, name, ": the last dimension is ", tensor.size(dim - 1),
        "; it must be ", features);
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < dim; ++d) count *= tensor.size(d);

  const bool contiguous = tensor.is_contiguous();
  const bool strided_matrix = !contiguous && dim == 2 && tensor.stride(1) == 1;
  Tensor keep = contiguous || strided_matrix ? tensor : torch::stable::contiguous(tensor);
  const ConstDenseView view{keep.const_data_ptr(), strided_matrix ? keep.stride(0) : features};
  return {std::move(keep), view, count};
}

int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// A contiguous tensor on the device of `like`. Straight from the allocator: `new_empty` looks its
// operator up by name and goes through the dispatcher at each call.
Tensor allocate(const Tensor& like, int32_t dtype, std::span<const int64_t> sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(std::ssize(sizes), sizes.data(),
                                                         strides.data(), dtype, device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor allocate_like_rows(const Tensor& rows, int64_t features) {
  std::vector<int64_t> sizes(rows.sizes().begin(), rows.sizes().end());
  sizes.back() = features;
  return allocate(rows, torch_dtype(rows), sizes);
}

void run_product(ProductDesc desc, ProductArgs args, const Tensor& output) {
  if (output.numel() == 0) return;
  Device::describe(desc);
  Device::will_write(output);
  args.output = {output.mutable_data_ptr(),
                 desc.product == Product::forward ? desc.out_features : desc.in_features};
  const Execution execution = Device::execution(output);
  const Kernel& kernel = choose(Device::backend(), desc);
  const int64_t bytes = workspace_size(kernel, desc, execution);
  if (bytes == 0) {
    run(kernel, desc, args, execution);
    return;
  }
  const Tensor workspace = allocate(output, aoti_torch_dtype_uint8(), std::array{bytes});
  args.workspace = workspace.mutable_data_ptr();
  run(kernel, desc, args, execution);
}

}  // namespace

// What the weight of forward is stored in.
struct Weight {
  const Tensor& values;
  BlockShape block;
  bool packed = false;             // values are [nnz, block_out * block_in] in packed order
  const Tensor* scales = nullptr;  // values are int8
};

static Tensor forward_of(const Tensor& input, const Weight& weight, const Tensor& index,
                         const std::optional<Tensor>& bias, int64_t out_features) {
  check(input.dim() >= 1, "input: must have at least one dimension");
  const auto& [values, block, packed, scales] = weight;
  ProductDesc desc;
  desc.product = Product::forward;
  desc.int8 = scales != nullptr;
  desc.dtype = desc.int8 ? dtype_of("input", input) : dtype_of("values", values);
  desc.packed = packed && packed_order(desc.dtype, block).strip > 0;
  desc.epilogue = bias ? Epilogue::bias : Epilogue::none;
  desc.out_features = check_features("out_features", out_features);
  desc.in_features = check_features("input", input.size(input.dim() - 1));
  desc.block = block;
  desc.nnz = values.size(0);
  if (!desc.int8) check_same("input", input, "values", values);
  check_same_device("values", values, "input", input);
  check_index_tensor("index", index);
  check_same_device("index", index, "input", input);

  const Rows x = rows_of("input", input, desc.in_features);
  const Tensor blocks = as_contiguous(values);
  desc.tokens = x.count;
  desc.alignment = common_alignment(
      {address(x.view.data), stride_bytes(x.view, desc.dtype), address(blocks.const_data_ptr())});
  ProductArgs args;
  args.x = x.view;
  args.weight = {pattern_of(index, desc), blocks.const_data_ptr()};
  desc.planned = args.weight.pattern.tiles != nullptr;
  // One for each output, on the device of the input.
  const auto of_outputs = [&](const char* name, const Tensor& tensor) {
    check_same_device(name, tensor, "input", input);
    check(tensor.dim() == 1 && tensor.size(0) == out_features, name, ": must have shape [",
          out_features, "], got ", describe(tensor));
    return as_contiguous(tensor);
  };
  std::optional<Tensor> contiguous_scales, contiguous_bias;
  if (desc.int8) {
    check(scales->scalar_type() == ScalarType::Float, "scales: must be float32 [", out_features,
          "], got ", describe(*scales));
    contiguous_scales = of_outputs("scales", *scales);
    args.weight.scales = static_cast<const float*>(contiguous_scales->const_data_ptr());
  }
  if (bias) {
    check_same("bias", *bias, "input", input);
    contiguous_bias = of_outputs("bias", *bias);
    args.bias = contiguous_bias->const_data_ptr();
  }
  Tensor output = allocate_like_rows(input, out_features);
  run_product(desc, args, output);
  return output;
}

Tensor forward(const Tensor& input, const Tensor& values, const Tensor& index,
               const std::optional<Tensor>& bias, int64_t out_features) {
  return forward_of(input, {values, block_shape_of(values)}, index, bias, out_features);
}

Tensor forward_packed(const Tensor& input, const Tensor& packed, const Tensor& index,
                      const std::optional<Tensor>& bias, int64_t out_features, int64_t block_out,
                      int64_t block_in) {
  const BlockShape block = block_shape_of_packed(packed, block_out, block_in);
  return forward_of(input, {packed, block, true}, index, bias, out_features);
}

Tensor forward_int8(const Tensor& input, const Tensor& values, const Tensor& scales,
                    const Tensor& index, const std::optional<Tensor>& bias, int64_t out_features) {
  check(is_int8(values), "values: must be int8 [nnz, block_out, block_in], got ", describe(values));
  return forward_of(input, {values, block_shape_of(values), false, &scales}, index, bias,
                    out_features);
}

Tensor grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& index,
                  int64_t in_features) {
  check(grad_output.dim() >= 1, "grad_output: must have at least one dimension");
  ProductDesc desc;
  desc.product = Product::grad_input;
  desc.dtype = dtype_of("values", values);
  desc.out_features = check_features("grad_output", grad_output.size(grad_output.dim() - 1));
  desc.in_features = check_features("in_features", in_features);
  desc.block = block_shape_of(values);
  desc.nnz = values.size(0);
  check_same("grad_output", grad_output, "values", values);
  check_same_device("values", values, "grad_output", grad_output);
  check_index_tensor("index", index);
  check_same_device("index", index, "grad_output", grad_output);

  const Rows dy = rows_of("grad_output", grad_output, desc.out_features);
  const Tensor blocks = as_contiguous(values);
  desc.tokens = dy.count;
  desc.alignment = common_alignment(
      {address(dy.view.data), stride_bytes(dy.view, desc.dtype), address(blocks.const_data_ptr())});
  ProductArgs args;
  args.dy = dy.view;
  args.weight = {pattern_of(index, desc), blocks.const_data_ptr()};
  desc.planned = args.weight.pattern.tiles != nullptr;
  Tensor output = allocate_like_rows(grad_output, in_features);
  run_product(desc, args, output);
  return output;
}

Tensor grad_weight(const Tensor& grad_output, const Tensor& input, const Tensor& index, int64_t nnz,
                   int64_t block_out, int64_t block_in) {
  check(grad_output.dim() >= 1, "grad_output: must have at least one dimension");
  check(input.dim() >= 1, "input: must have at least one dimension");
  ProductDesc desc;
  desc.product = Product::grad_weight;
  desc.dtype = dtype_of("input", input);
  desc.out_features = check_features("grad_output", grad_output.size(grad_output.dim() - 1));
  desc.in_features = check_features("input", input.size(input.dim() - 1));
  desc.block = {check_block("block_out", block_out), check_block("block_in", block_in)};
  check_same("grad_output", grad_output, "input", input);
  check_same_device("input", input, "grad_output", grad_output);
  check_index_tensor("index", index);
  check_same_device("index", index, "grad_output", grad_output);

  desc.nnz = nnz;
  check(nnz >= 0 && nnz <= std::numeric_limits<int32_t>::max(), "nnz: is ", nnz,
        "; it must be in [0, 2^31)");

  const Rows dy = rows_of("grad_output", grad_output, desc.out_features);
  const Rows x = rows_of("input", input, desc.in_features);
  check(dy.count == x.count, "input: has ", x.count, " rows, but grad_output has ", dy.count);
  desc.tokens = x.count;
  desc.alignment = common_alignment({address(x.view.data), stride_bytes(x.view, desc.dtype),
                                     address(dy.view.data), stride_bytes(dy.view, desc.dtype)});
  ProductArgs args;
  args.x = x.view;
  args.dy = dy.view;
  args.weight = {pattern_of(index, desc), nullptr};
  desc.planned = args.weight.pattern.tiles != nullptr;
  Tensor output = allocate(input, torch_dtype(input), std::array{desc.nnz, block_out, block_in});
  run_product(desc, args, output);
  return output;
}

Tensor with_walks(const Tensor& index, int64_t block_rows, int64_t block_cols, int64_t nnz,
                  int64_t block_out, int64_t block_in) {
  check_index_tensor("index", index);
  const BlockShape block{check_block("block_out", block_out), check_block("block_in", block_in)};
  constexpr int64_t max = std::numeric_limits<int32_t>::max();
  check(block_rows >= 0 && block_rows < max && block_cols >= 0 && block_cols < max && nnz >= 0 &&
            nnz <= max,
        "block_rows, block_cols, nnz: are ", block_rows, ", ", block_cols, ", ", nnz,
        "; they must be in [0, 2^31)");
  const GridShape grid{block_rows, block_cols, nnz};
  const int64_t size = grid.index_size();
  check(index.numel() == size, "index: has ", index.numel(), " entries; ", block_rows, " x ",
        block_cols, " blocks with ", nnz, " present need ", size);
  const int64_t walks = Device::walks_size(grid, block);
  Tensor result = torch::stable::new_empty(index, {size + walks});
  auto* entries = static_cast<int32_t*>(result.mutable_data_ptr());
  Tensor head = torch::stable::narrow(result, 0, 0, size);
  torch::stable::copy_(head, index);
  if (walks > 0) {
    Device::build_walks(PatternView::of_packed(entries, grid), block, entries + size);
  }
  return result;
}

std::string explain(const Tensor& values, std::string product, int64_t tokens, int64_t out_features,
                    int64_t in_features, bool bias, bool packed,
                    const std::optional<Tensor>& input) {
  ProductDesc desc;
  desc.product = product_from_string(product);
  desc.int8 = is_int8(values);
  check(!desc.int8 || (input && !packed),
        "values: are int8; these are not packed, and an `input` has to say the dtype of the rest");
  desc.dtype = desc.int8 ? dtype_of("input", *input) : dtype_of("values", values);
  desc.epilogue = bias && desc.product == Product::forward ? Epilogue::bias : Epilogue::none;
  check(tokens >= 0, "tokens: must be at least 0, got ", tokens);
  desc.tokens = tokens;
  desc.out_features = check_features("out_features", out_features);
  desc.in_features = check_features("in_features", in_features);
  desc.block = block_shape_of(values);
  desc.nnz = values.size(0);
  desc.packed = packed && packed_order(desc.dtype, desc.block).strip > 0;
  desc.planned = Device::walks_size(desc.grid(), desc.block) > 0;
  Device::describe(desc);
  return block_sparse::explain(Device::backend(), desc, Device::execution(values));
}

}  // namespace block_sparse::binding
