// The instruction set levels of the machine that the tests run on.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>

#include "block_sparse/check.h"
#include "cpu/level.h"

namespace block_sparse {

// Calls f with each instruction set of this machine forced.
template <class F>
void for_each_level(const F& f) {
  for (const char* name : {"avx512_bf16", "avx512", "avx2", "neon", "baseline"}) {
    SCOPED_TRACE(name);
    ::setenv("BLOCK_SPARSE_ISA", name, 1);
    bool supported = true;
    try {
      cpu::level();
    } catch (const Error&) {
      supported = false;
    }
    if (supported) f();
    ::unsetenv("BLOCK_SPARSE_ISA");
  }
}

}  // namespace block_sparse
