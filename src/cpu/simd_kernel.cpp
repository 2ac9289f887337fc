// The vectorised kernel of the CPU, as dispatch sees it: chooses the instruction set level.
#include <array>
#include <cstdlib>

#include "block_sparse/check.h"
#include "cpu/level.h"
#include "kernels.h"

namespace block_sparse::cpu {

// Each is defined by its own compilation of level.cpp (cmake/cpu_levels.cmake).
#ifdef __x86_64__
namespace avx512_bf16 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
namespace avx2 {
extern const Level level;
}
#endif
namespace baseline {
extern const Level level;
}

namespace {

// From the best to the baseline, which every machine supports.
const Level* const kLevels[] = {
#ifdef __x86_64__
    &avx512_bf16::level,
    &avx512::level,
    &avx2::level,
#endif
    &baseline::level,
};

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
  static const Level* const best = [] {
    for (const Level* level : kLevels) {
      if (level->supported()) return level;
    }
    __builtin_unreachable();
  }();
  return *best;
}

Kernel simd() {
  return {"cpu_simd", [](const ProductDesc&) -> Refusal { return std::nullopt; },
          [](const ProductDesc& desc, const Execution& execution) {
            return level().workspace(desc, execution);
          },
          [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
            level().run(desc, args, execution);
          }};
}

}  // namespace block_sparse::cpu
