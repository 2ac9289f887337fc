// Names and printing of products.
#include "block_sparse/product.h"

#include "block_sparse/check.h"

namespace block_sparse {

std::string_view to_string(Product product) {
  switch (product) {
    case Product::forward:
      return "forward";
    case Product::grad_input:
      return "grad_input";
    case Product::grad_weight:
      return "grad_weight";
  }
  return "?";
}

Product product_from_string(std::string_view name) {
  for (Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
    if (to_string(product) == name) return product;
  }
  throw Error(concat("product: must be forward, grad_input or grad_weight, got '", name, "'"));
}

std::string to_string(const ProductDesc& desc) {
  const GridShape grid = desc.grid();
  const double cells = static_cast<double>(grid.block_rows) * static_cast<double>(grid.block_cols);
  return concat(to_string(desc.product), " ", to_string(desc.dtype), " tokens=", desc.tokens,
                " out=", desc.out_features, " in=", desc.in_features, " block=", desc.block.out,
                "x", desc.block.in, " nnz=", desc.nnz,
                " density=", cells > 0 ? static_cast<double>(desc.nnz) / cells : 0.0,
                desc.packed ? " packed" : "", desc.int8 ? " int8" : "",
                desc.product == Product::forward ? concat(" epilogue=", to_string(desc.epilogue))
                                                 : std::string());
}

}  // namespace block_sparse
