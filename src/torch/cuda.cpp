// The library _C_cuda: the CUDA side of the ops. It is built against any torch, with or without
// CUDA, and loaded after _C, which has the schemas, where torch has CUDA.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <limits>
#include <stdexcept>

#include "binding.h"
#include "block_sparse/check.h"
#include "cuda/dots.h"
#include "cuda/index.h"
#include "cuda/sm90/walks.h"
#include "cuda/zero.h"

namespace block_sparse::binding {
namespace {

// libtorch_cuda is not linked, since a CPU-only torch lacks it: the few functions that are needed
// are looked up in the library that `import torch` has loaded, and in those that it needs. Null
// where there is none of that name.
template <class Function>
Function torch_cuda_function(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return reinterpret_cast<Function>(library ? dlsym(library, name) : nullptr);
}

void* current_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t device, void** stream);
  static const auto get = torch_cuda_function<Getter>("aoti_torch_get_current_cuda_stream");
  if (get == nullptr) throw std::runtime_error("block_sparse: this torch has no CUDA");
  void* stream = nullptr;
  if (get(device, &stream) != 0) {
    throw std::runtime_error(concat("block_sparse: no current stream on cuda:", device));
  }
  return stream;
}

// Whether torch's float32 products may round to TF32 (torch.set_float32_matmul_precision). The
// stable ABI has no function for it, but torch tells cuBLAS whenever it hands out its handle.
bool tf32_is_allowed() {
  constexpr int kTf32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
  using GetHandle = int32_t (*)(void** handle);
  using GetMode = int (*)(void* handle, int* mode);
  static const auto get_handle =
      torch_cuda_function<GetHandle>("torch_get_current_cuda_blas_handle");
  static const auto get_mode = torch_cuda_function<GetMode>("cublasGetMathMode");
  void* handle = nullptr;
  int mode = 0;
  if (get_handle == nullptr || get_mode == nullptr || get_handle(&handle) != 0) return false;
  return get_mode(handle, &mode) == 0 && (mode & 0xf) == kTf32;
}

// A tensor of what lies on the current device. It owns nothing.
template <size_t dims>
Tensor tensor_of(Dtype dtype, const void* data, std::array<int64_t, dims> sizes,
                 std::array<int64_t, dims> strides) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                     torch::stable::accelerator::getCurrentDeviceIndex());
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, device,
                                  scalar_type_of(dtype));
}

// By torch: what precision it takes for float32, and which library, is the user's choice there.
void dense_product(const DenseProduct& product) {
  const auto& [dtype, rows, cols, depth, a, b, bias, out] = product;
  std::optional<Tensor> added;
  if (bias != nullptr) added = tensor_of<1>(dtype, bias, {cols}, {1});
  const Tensor result = tensor_of<2>(dtype, out.data, {rows, cols}, {out.row_stride, 1});
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(
          tensor_of<2>(dtype, a.data, {rows, depth}, {a.row_stride, a.col_stride})),
      torch::stable::detail::from(
          tensor_of<2>(dtype, b.data, {cols, depth}, {b.row_stride, b.col_stride})),
      torch::stable::detail::from(added),
      torch::stable::detail::from(result),
  };
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the result again; it has to be taken
}

}  // namespace

Backend Device::backend() { return Backend::cuda; }

Execution Device::execution(const Tensor& tensor) {
  Execution execution;
  execution.stream = current_stream(tensor.get_device_index());
  execution.dense_product = dense_product;
  return execution;
}

void Device::will_write(const Tensor&) {}

void Device::describe(ProductDesc& desc) {
  // With fewer tokens it makes no difference, and a first handle costs more than a product.
  constexpr int64_t kFewTokens = 64;
  desc.dense_product = true;
  desc.tf32 = desc.dtype == Dtype::f32 && desc.tokens > kFewTokens && tf32_is_allowed();
}

// Looking at the indices would need a synchronisation: the kernels clamp what they read instead.
void Device::check_index(const PatternView&) {}

int64_t Device::walks_size(GridShape grid, BlockShape block) {
  return cuda::sm90::walks_size(grid, block);
}

void Device::attach_walks(PatternView& pattern, BlockShape block, const int32_t* walks) {
  cuda::sm90::attach_walks(pattern, block, walks);
}

void Device::build_walks(const PatternView& pattern, BlockShape block, int32_t* walks) {
  cuda::sm90::build_walks(pattern, block, walks,
                          current_stream(torch::stable::accelerator::getCurrentDeviceIndex()));
}

void Device::zero_blocks(std::span<const BlocksToZero> tensors, const Tensor& like) {
  check(like.is_cuda(), "values: are not on a GPU, but another tensor is");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  cuda::zero_blocks(tensors, current_stream(like.get_device_index()));
}

namespace {

// Runs an op with the device of its first argument current: streams and launches belong to a
// device, and torch makes none current for an op that is not its own.
template <auto op>
struct OnDevice;

template <class Result, class... Rest, Result (*op)(const Tensor&, Rest...)>
struct OnDevice<op> {
  static Result call(const Tensor& first, Rest... rest) {
    check(first.is_cuda(), "the first tensor argument is not on a GPU, but another one is");
    const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
    return op(first, rest...);
  }
};

// As on the CPU, but it checks sizes only, and the result never leaves the GPU.
Tensor index_from_bsr(const Tensor& crow_indices, const Tensor& col_indices, int64_t block_cols) {
  constexpr int64_t max_index = std::numeric_limits<int32_t>::max();
  check_index_tensor("crow_indices", crow_indices);
  check_index_tensor("col_indices", col_indices);
  check_same_device("col_indices", col_indices, "crow_indices", crow_indices);
  check(crow_indices.numel() >= 1, "crow_indices: is empty; it needs block_rows + 1 entries");
  const GridShape grid{crow_indices.numel() - 1, block_cols, col_indices.numel()};
  check(block_cols >= 0 && block_cols < max_index && grid.block_rows < max_index,
        "pattern: the grid is ", grid.block_rows, " x ", block_cols,
        " blocks; both must be in [0, 2^31 - 1)");
  check(grid.nnz <= max_index && grid.nnz <= grid.block_rows * block_cols,
        "col_indices: ", grid.nnz, " blocks do not fit a grid of ", grid.block_rows, " x ",
        block_cols);
  Tensor index = torch::stable::new_empty(crow_indices, {grid.index_size()});
  cuda::build_index(static_cast<const int32_t*>(crow_indices.const_data_ptr()),
                    static_cast<const int32_t*>(col_indices.const_data_ptr()), grid,
                    static_cast<int32_t*>(index.mutable_data_ptr()),
                    current_stream(index.get_device_index()));
  return index;
}

// Sums of values * others, of all blocks of all tensors; `instead` stands for the values of
// `blocks`.
Tensor block_dots(const std::vector<Tensor>& values, const std::vector<Tensor>& others,
                  const std::vector<Tensor>& blocks, const std::vector<Tensor>& instead) {
  const size_t number = values.size();
  check(
      number > 0 && others.size() == number && blocks.size() == number && instead.size() == number,
      "values, others, blocks, instead: have ", number, ", ", others.size(), ", ", blocks.size(),
      " and ", instead.size(), " tensors; there must be equally many, and one at least");
  const Tensor& first = values[0];
  check(first.is_cuda(), "values: are not on a GPU, but another tensor is");
  const Dtype dtype = dtype_of("values", first);
  const auto check_blocks = [&](const char* name, const Tensor& tensor, const Tensor& like,
                                int64_t nnz) {
    check(tensor.scalar_type() == first.scalar_type() && tensor.dim() == 3 &&
              tensor.is_contiguous() && tensor.size(0) == nnz && tensor.size(1) == like.size(1) &&
              tensor.size(2) == like.size(2),
          name, ": must be contiguous, of one dtype and of the shape of the values, got ",
          describe(tensor), " for ", describe(like));
    check_same_device(name, tensor, "the first of the values", first);
  };
  int64_t total = 0;
  for (size_t i = 0; i < number; ++i) {
    check(values[i].dim() == 3, "values: must be [nnz, block_out, block_in], got ",
          describe(values[i]));
    check_blocks("values", values[i], values[i], values[i].size(0));
    check_blocks("others", others[i], values[i], values[i].size(0));
    check_blocks("instead", instead[i], values[i], blocks[i].numel());
    total += values[i].size(0);
  }
  const auto summed = dtype == Dtype::f64 ? torch::headeronly::ScalarType::Double
                                          : torch::headeronly::ScalarType::Float;
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
  Tensor sums = torch::stable::new_empty(first, {total}, summed);
  auto* to = static_cast<char*>(sums.mutable_data_ptr());
  std::vector<cuda::BlockDots> all, replaced;
  for (size_t i = 0; i < number; ++i) {
    const int64_t nnz = values[i].size(0), count = blocks[i].numel();
    const int64_t elements = values[i].size(1) * values[i].size(2);
    const void* other = others[i].const_data_ptr();
    all.push_back({values[i].const_data_ptr(), other, nullptr, to, nnz, nnz, elements});
    replaced.push_back({instead[i].const_data_ptr(), other, block_numbers(blocks[i], first), to,
                        count, nnz, elements});
    to += nnz * static_cast<int64_t>(sums.element_size());
  }
  void* stream = current_stream(first.get_device_index());
  cuda::block_dots(dtype, all, stream);
  cuda::block_dots(dtype, replaced, stream);
  return sums;
}

}  // namespace
}  // namespace block_sparse::binding

namespace binding = block_sparse::binding;

STABLE_TORCH_LIBRARY_IMPL(block_sparse, CUDA, m) {
  m.impl("forward", TORCH_BOX(&binding::OnDevice<&binding::forward>::call));
  m.impl("forward_int8", TORCH_BOX(&binding::OnDevice<&binding::forward_int8>::call));
  m.impl("grad_input", TORCH_BOX(&binding::OnDevice<&binding::grad_input>::call));
  m.impl("grad_weight", TORCH_BOX(&binding::OnDevice<&binding::grad_weight>::call));
  m.impl("zero_blocks_", TORCH_BOX(&binding::zero_blocks));
  m.impl("block_dots", TORCH_BOX(&binding::block_dots));
  m.impl("explain", TORCH_BOX(&binding::OnDevice<&binding::explain>::call));
  m.impl("with_walks", TORCH_BOX(&binding::OnDevice<&binding::with_walks>::call));
  m.impl("index_from_bsr", TORCH_BOX(&binding::OnDevice<&binding::index_from_bsr>::call));
}
