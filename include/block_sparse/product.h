// Product: one of the three of a linear layer, described (ProductDesc), given its operands
// (ProductArgs) and run by the first kernel that accepts it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "block_sparse/dtype.h"
#include "block_sparse/epilogue.h"
#include "block_sparse/matrix.h"
#include "block_sparse/pattern.h"

namespace block_sparse {

enum class Product : uint8_t {
  forward,      // y[tokens, out]  = x[tokens, in] Wt (+ bias)
  grad_input,   // dx[tokens, in]  = dy[tokens, out] W
  grad_weight,  // dW[nnz, block]  = dyt x, at the present blocks only
};
std::string_view to_string(Product product);
Product product_from_string(std::string_view name);  // throws on another name

// What is asked, without pointers: dispatch, logs, benchmark labels and test ids print it.
struct ProductDesc {
  Product product = Product::forward;
  Dtype dtype = Dtype::f32;
  Epilogue epilogue = Epilogue::none;
  int64_t tokens = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  BlockShape block;
  int64_t nnz = 0;
  // Bytes, a power of two up to 16: what all addresses and row strides are multiples of.
  int64_t alignment = 16;
  // The pattern brings what a GPU's kernels plan for it.
  bool planned = false;
  // The values are in packed order (packed.h), which is not the canonical one. Forward only.
  bool packed = false;
  // The values are int8, in canonical order, with a scale for each output: y = scale * sum + bias.
  // Everything else is of `dtype`. Forward only.
  bool int8 = false;
  // The caller lends a dense product (Execution::dense_product), and it may round float32 to TF32.
  bool dense_product = false;
  bool tf32 = false;
  // Operands were rounded from float32 to `dtype`, f16, each times a power of two; output and bias
  // are float32. No caller asks for it: a kernel for float32 does, of one for f16.
  bool rounded = false;
  // BLOCK_SPARSE_KERNEL names the kernels to try: none has to be the fastest. Set by dispatch.
  bool forced = false;

  constexpr GridShape grid() const {
    return {(out_features + block.out - 1) / block.out, (in_features + block.in - 1) / block.in,
            nnz};
  }
};
std::string to_string(const ProductDesc& desc);

// The operands. Which of them a product reads and writes:
//               x [tokens, in]   dy [tokens, out]   values     bias    output
//   forward     read                                read       read    y  [tokens, out]
//   grad_input                   read               read               dx [tokens, in]
//   grad_weight read             read                                  dW [nnz, block]
struct ProductArgs {
  ConstDenseView x;
  ConstDenseView dy;
  MatrixView weight;
  const void* bias = nullptr;      // [out], or null
  MutableDenseView output;         // dW is contiguous: its row_stride is not read
  const float* factors = nullptr;  // [2], where `rounded`: what the sums are multiplied with
  void* workspace = nullptr;       // as many bytes as the kernel asked for, 64-byte aligned
};

// out[rows, cols] = a[rows, depth] times the transpose of b[cols, depth], plus bias[cols] where
// there is one. Strides count elements; rows and columns of a and b may lie in either order.
struct DenseProduct {
  struct Operand {
    const void* data = nullptr;
    int64_t row_stride = 0;
    int64_t col_stride = 1;
  };
  Dtype dtype = Dtype::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t depth = 0;
  Operand a;
  Operand b;
  const void* bias = nullptr;
  MutableDenseView out;
};

// The machine as the caller lends it. The core starts no threads and creates no streams, and has no
// dense product.
struct Execution {
  // Calls body(context, begin, end) on ranges that cover [0, count), perhaps in parallel.
  using Body = void (*)(const void* context, int64_t begin, int64_t end);
  void (*parallel_for)(int64_t count, Body body, const void* context) = nullptr;
  int threads = 1;
  void* stream = nullptr;  // cudaStream_t
  // The caller's library of dense products, on the stream above and the current device; null where
  // there is none.
  void (*dense_product)(const DenseProduct& product) = nullptr;
};

enum class Backend : uint8_t { cpu, cuda };

// Runs f(begin, end) on the threads that the caller lends; on this one alone when there are none.
template <class F>
void parallel_for(const Execution& execution, int64_t count, const F& f) {
  if (execution.parallel_for == nullptr || execution.threads <= 1 || count <= 1) {
    f(int64_t{0}, count);
    return;
  }
  execution.parallel_for(
      count,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      &f);
}

struct Kernel;  // src/kernel.h

// The first kernel of the backend's list that does not refuse. BLOCK_SPARSE_KERNEL, where set, is a
// comma-separated list of kernel names that replaces the order; an unknown name is an error.
const Kernel& choose(Backend backend, const ProductDesc& desc);

// Bytes of workspace that the chosen kernel wants, and the run itself.
int64_t workspace_size(const Kernel& kernel, const ProductDesc& desc, const Execution& execution);
void run(const Kernel& kernel, const ProductDesc& desc, const ProductArgs& args,
         const Execution& execution);

// For people: the description, the chosen kernel and its workspace, and why others refused.
std::string explain(Backend backend, const ProductDesc& desc, const Execution& execution);

}  // namespace block_sparse
