// The kernels that exist, one line each. The order of preference is in dispatch.cpp.
#pragma once

#include "kernel.h"

namespace block_sparse {

namespace cpu {
Kernel few_tokens();  // src/cpu/simd_kernel.cpp
Kernel panel();       // src/cpu/simd_kernel.cpp
Kernel simd();        // src/cpu/simd_kernel.cpp
Kernel reference();   // src/reference.cpp
}  // namespace cpu

namespace cuda {
namespace sm90 {
Kernel resident();  // src/cuda/sm90/resident.cu
Kernel panel();     // src/cuda/sm90/panel.cu
Kernel sampled();   // src/cuda/sm90/sampled.cu
Kernel strip();     // src/cuda/sm90/strip.cu
Kernel tf32();      // src/cuda/sm90/tf32.cu
}  // namespace sm90
namespace sm80 {
Kernel sampled();  // src/cuda/sm80/sampled.cu
Kernel strip();    // src/cuda/sm80/strip.cu
}  // namespace sm80
Kernel few_tokens();  // src/cuda/skinny/skinny.cu
Kernel dense();       // src/cuda/dense/dense.cu
Kernel tiled();       // src/cuda/tiled/tiled.cu
Kernel reference();   // src/cuda/reference.cu
}  // namespace cuda

}  // namespace block_sparse
