// Dispatch: one list of kernels per backend, and the rule that picks from it: the first that does
// not refuse.
#include <algorithm>
#include <cstdlib>
#include <vector>

#include "block_sparse/check.h"
#include "kernels.h"

namespace block_sparse {

// The CUDA library compiles this file again, for its own list.
std::span<const Kernel> kernels(Backend backend) {
#ifdef BLOCK_SPARSE_WITH_CUDA
  constexpr Backend built_for = Backend::cuda;
  static const Kernel list[] = {
      cuda::few_tokens(),
      // Hopper
      cuda::sm90::resident(),
      cuda::sm90::panel(),
      cuda::sm90::strip(),
      cuda::sm90::sampled(),
      cuda::sm90::tf32(),
      // From Ampere on
      cuda::sm80::strip(),
      cuda::sm80::sampled(),
      // Any
      cuda::dense(),
      cuda::tiled(),
      cuda::reference(),
  };
#else
  constexpr Backend built_for = Backend::cpu;
  static const Kernel list[] = {
      cpu::few_tokens(),
      cpu::panel(),
      cpu::simd(),
      cpu::reference(),
  };
#endif
  return backend == built_for ? std::span<const Kernel>(list) : std::span<const Kernel>();
}

namespace {

std::string names(Backend backend) {
  std::string list;
  for (const Kernel& kernel : kernels(backend)) {
    list += (list.empty() ? "" : ", ") + std::string(kernel.name);
  }
  return list;
}

// A name may belong to the other backend: one variable serves a program that uses both.
bool belongs_to(std::string_view name, Backend backend) {
  return !name.starts_with(backend == Backend::cpu ? "cuda_" : "cpu_");
}

// The kernels that a comma-separated list of names means, in its order.
std::vector<const Kernel*> named_kernels(Backend backend, std::string_view rest) {
  std::vector<const Kernel*> order;
  while (!rest.empty()) {
    const std::string_view name = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), name.size() + 1));
    if (!belongs_to(name, backend)) continue;
    bool found = false;
    for (const Kernel& kernel : kernels(backend)) {
      if (kernel.name != name) continue;
      order.push_back(&kernel);
      found = true;
    }
    check(found, "BLOCK_SPARSE_KERNEL: no kernel is called '", name,
          "'; there are: ", names(backend));
  }
  return order;
}

// Calls `visit` on the kernels to try and why each refuses, in order, until it returns true: those
// that BLOCK_SPARSE_KERNEL names, or else the backend's list.
template <class Visit>
void for_each_candidate(Backend backend, ProductDesc desc, Visit visit) {
  if (const char* forced = std::getenv("BLOCK_SPARSE_KERNEL")) {
    const auto order = named_kernels(backend, forced);
    desc.forced = !order.empty();
    for (const Kernel* kernel : order) {
      if (visit(*kernel, kernel->why_not(desc))) return;
    }
    if (!order.empty()) return;
  }
  for (const Kernel& kernel : kernels(backend)) {
    if (visit(kernel, kernel.why_not(desc))) return;
  }
}

}  // namespace

const Kernel& choose(Backend backend, const ProductDesc& desc) {
  const Kernel* chosen = nullptr;
  std::string reasons;
  for_each_candidate(backend, desc, [&](const Kernel& kernel, const Refusal& refusal) {
    if (refusal) {
      reasons += concat("\n  ", kernel.name, ": ", *refusal);
      return false;
    }
    chosen = &kernel;
    return true;
  });
  if (chosen == nullptr) throw Error(concat("no kernel accepts ", to_string(desc), reasons));
  return *chosen;
}

int64_t workspace_size(const Kernel& kernel, const ProductDesc& desc, const Execution& execution) {
  return kernel.workspace(desc, execution);
}

void run(const Kernel& kernel, const ProductDesc& desc, const ProductArgs& args,
         const Execution& execution) {
  kernel.run(desc, args, execution);
}

std::string explain(Backend backend, const ProductDesc& desc, const Execution& execution) {
  std::string text = to_string(desc);
  bool chosen = false;
  for_each_candidate(backend, desc, [&](const Kernel& kernel, const Refusal& refusal) {
    text += concat("\n  ", kernel.name, ": ");
    if (refusal) {
      text += concat("refuses: ", *refusal);
    } else if (!chosen) {
      text += concat("chosen, workspace ", kernel.workspace(desc, execution), " bytes");
      chosen = true;
    } else {
      text += "would accept";
    }
    return false;
  });
  return text;
}

}  // namespace block_sparse
