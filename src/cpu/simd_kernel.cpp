// The vectorised kernels of the CPU, as dispatch sees them: choose the instruction set level.
#include <algorithm>
#include <cstdlib>

#include "block_sparse/check.h"
#include "cpu/level.h"
#include "kernels.h"

namespace block_sparse::cpu {

// Each is defined by its own compilation of level.cpp. cmake/cpu_levels.cmake lists them as
// X(name), from the best to the one that every machine supports.
#define X(name)             \
  namespace name {          \
  extern const Level level; \
  }
BLOCK_SPARSE_LEVELS
#undef X

namespace {

#define X(name) &name::level,
const Level* const kLevels[] = {BLOCK_SPARSE_LEVELS};
#undef X

std::string names_of_supported() {
  std::string names;
  for (const Level* level : kLevels) {
    if (level->supported()) names += concat(names.empty() ? "" : ", ", level->name);
  }
  return names;
}

}  // namespace

const Level& level() {
  const char* forced = std::getenv("BLOCK_SPARSE_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (const Level* level : kLevels) {
      if (level->name != forced) continue;
      check(level->supported(), "BLOCK_SPARSE_ISA: this machine does not support '", forced,
            "'; it supports: ", names_of_supported());
      return *level;
    }
    throw Error(concat("BLOCK_SPARSE_ISA: there is no level '", forced,
                       "'; this machine supports: ", names_of_supported()));
  }
  static const Level* const best = []() -> const Level* {
    for (const Level* level : kLevels) {
      if (level->supported()) return level;
    }
    throw Error("no instruction set level that was built runs on this machine");
  }();
  return *best;
}

constexpr const char* kNotPacked = "reads values in canonical order, not packed ones";

Kernel simd() {
  return {"cpu_simd",
          [](const ProductDesc& desc) -> Refusal {
            if (desc.packed) return kNotPacked;
            return why_not_served(desc);
          },
          [](const ProductDesc& desc, const Execution& execution) {
            return level().any.workspace(desc, execution);
          },
          [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
            level().any.run(desc, args, execution);
          }};
}

Kernel panel() {
  return {"cpu_panel",
          [](const ProductDesc& desc) -> Refusal {
            if (Refusal refusal = why_not_served(desc)) return refusal;
            if (desc.packed) return std::nullopt;  // in whole vectors, of any level
            // In forward the blocks are transposed first: that takes many tokens to pay.
            const int64_t kMinTokens = desc.product == Product::forward ? 128 : 32;
            if (desc.product == Product::grad_weight) return "computes no grad_weight";
            if (desc.tokens < kMinTokens) {
              return concat("is for at least ", kMinTokens, " tokens, not ", desc.tokens);
            }
            const bool forward = desc.product == Product::forward;
            // Where blocks are shallower, an entry costs as much as its steps; where they are
            // narrower, a tile has half of its width: Spmm has neither.
            constexpr int64_t kMinSide = 16;
            if (std::min(desc.block.out, desc.block.in) < kMinSide) {
              return concat("takes blocks of at least ", kMinSide, "x", kMinSide, ", not ",
                            desc.block.out, "x", desc.block.in);
            }
            const int64_t outputs = forward ? desc.block.out : desc.block.in;
            const int64_t lanes = level().vector_bytes / (desc.dtype == Dtype::f64 ? 8 : 4);
            if (outputs % lanes == 0) return std::nullopt;
            return concat("takes blocks of a multiple of ", lanes, forward ? " outputs" : " inputs",
                          ", not ", outputs);
          },
          [](const ProductDesc& desc, const Execution& execution) {
            return level().panel.workspace(desc, execution);
          },
          [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
            level().panel.run(desc, args, execution);
          }};
}

Kernel few_tokens() {
  return {"cpu_few_tokens",
          [](const ProductDesc& desc) -> Refusal {
            constexpr int64_t kMaxTokens = 8, kMinBlock = 16;
            if (desc.packed) return kNotPacked;
            if (Refusal refusal = why_not_served(desc)) return refusal;
            if (desc.product == Product::grad_weight) return "computes no grad_weight";
            if (desc.tokens > kMaxTokens) {
              return concat("is for at most ", kMaxTokens, " tokens, not ", desc.tokens);
            }
            if (desc.block.in < kMinBlock) {
              return concat("reads blocks of at least ", kMinBlock, " inputs, not ", desc.block.in);
            }
            if (desc.product == Product::forward) return std::nullopt;
            if (size_of(desc.dtype) < 4) return "computes grad_input in f32 and f64 only";
            if (desc.block.in % kMinBlock != 0) {
              return concat("grad_input takes blocks of a multiple of ", kMinBlock, " inputs, not ",
                            desc.block.in);
            }
            return std::nullopt;
          },
          [](const ProductDesc& desc, const Execution& execution) {
            return level().few_tokens.workspace(desc, execution);
          },
          [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
            level().few_tokens.run(desc, args, execution);
          }};
}

}  // namespace block_sparse::cpu
