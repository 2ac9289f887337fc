# The core: patterns, dispatch, CPU kernels. No torch, no CUDA.
set(BLOCK_SPARSE_CORE_SOURCES
  src/dispatch.cpp
  src/pattern.cpp
  src/product.cpp
)
add_library(block_sparse_core STATIC
  ${BLOCK_SPARSE_CORE_SOURCES}
  src/cpu/simd_kernel.cpp
  src/packed.cpp
  src/reference.cpp
)
target_link_libraries(block_sparse_core PUBLIC $<BUILD_INTERFACE:block_sparse_flags>)

include(cmake/cpu_levels.cmake)
