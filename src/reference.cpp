// The reference kernel of the CPU: plain loops, double accumulation. Last in the list.
#include "reference.h"

#include "kernels.h"

namespace block_sparse::cpu {
namespace {

int64_t workspace(const ProductDesc&, const Execution&) { return 0; }

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  visit(desc.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t cols = reference::output_cols(desc);
    parallel_for(execution, reference::output_rows(desc), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t c = 0; c < cols; ++c) reference::element<double, T>(desc, args, r, c);
      }
    });
  });
}

}  // namespace

Kernel reference() { return {"cpu_reference", why_not_served, workspace, run}; }

}  // namespace block_sparse::cpu
