# The CUDA kernels, as a static library for _C_cuda. Needs nvcc, and no GPU.
if(CMAKE_VERSION VERSION_LESS 3.26)
  message(FATAL_ERROR "CUDA needs CMake 3.26, the first that knows nvcc's C++20; this is "
    "${CMAKE_VERSION} (pip install cmake)")
endif()
if(NOT CMAKE_CUDA_COMPILER)
  find_program(BLOCK_SPARSE_NVCC nvcc HINTS /usr/local/cuda/bin)
  if(BLOCK_SPARSE_NVCC)
    set(CMAKE_CUDA_COMPILER ${BLOCK_SPARSE_NVCC})
  endif()
endif()
# Machine code for Ampere and Ada (80) and for Hopper with its own instructions (90a), and PTX from
# which the driver makes the rest: 75 for Turing, 90 for what comes after Hopper. CUDAARCHS in the
# environment says something else.
if(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 75-virtual 80-real 90a-real 90-virtual)
endif()
# One wheel serves machines with any CUDA runtime, or with none.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3")
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.3)
  message(FATAL_ERROR "CUDA needs nvcc 12.3, the first that reads and writes 16 bytes as one; this "
    "is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
include(cmake/cutlass.cmake)

add_library(block_sparse_cuda STATIC
  ${BLOCK_SPARSE_CORE_SOURCES}
  src/cuda/dots.cu
  src/cuda/index.cu
  src/cuda/dense/dense.cu
  src/cuda/skinny/skinny.cu
  src/cuda/sm90/order.cu
  src/cuda/sm90/strip.cu
  src/cuda/sm90/strip_walk.cu
  src/cuda/sm90/tiles.cu
  src/cuda/sm90/walks.cpp
  src/cuda/reference.cu
  src/cuda/tiled/tiled.cu
  src/cuda/tiled/tiled_bf16.cu
  src/cuda/tiled/tiled_f16.cu
  src/cuda/tiled/tiled_f32.cu
  src/cuda/tiled/tiled_f64.cu
  src/cuda/zero.cu
)
target_compile_definitions(block_sparse_cuda PRIVATE BLOCK_SPARSE_WITH_CUDA)

# Hopper's own instructions exist for Hopper only.
add_library(block_sparse_sm90 OBJECT
  src/cuda/sm90/panel.cu
  src/cuda/sm90/resident.cu
  src/cuda/sm90/sampled.cu
  src/cuda/sm90/strip_forward.cu
  src/cuda/sm90/strip_grad_input.cu
  src/cuda/sm90/tf32.cu
)
set_target_properties(block_sparse_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
target_link_libraries(block_sparse_sm90 PRIVATE block_sparse_cutlass)
target_sources(block_sparse_cuda PRIVATE $<TARGET_OBJECTS:block_sparse_sm90>)

# Ampere's exist from there on.
set(BLOCK_SPARSE_SM80 ${CMAKE_CUDA_ARCHITECTURES})
list(FILTER BLOCK_SPARSE_SM80 EXCLUDE REGEX "^[5-7][0-9]")
if(NOT BLOCK_SPARSE_SM80)
  set(BLOCK_SPARSE_SM80 80)
endif()
add_library(block_sparse_sm80 OBJECT
  src/cuda/skinny/skinny_bf16.cu
  src/cuda/skinny/skinny_f16.cu
  src/cuda/skinny/skinny_f32.cu
  src/cuda/skinny/skinny_int8.cu
  src/cuda/sm80/sampled.cu
  src/cuda/sm80/strip.cu
)
set_target_properties(block_sparse_sm80 PROPERTIES CUDA_ARCHITECTURES "${BLOCK_SPARSE_SM80}")
target_sources(block_sparse_cuda PRIVATE $<TARGET_OBJECTS:block_sparse_sm80>)

# Smaller, and decompressed when it is loaded. Only from 13 on can every driver that runs what nvcc
# made read this, too.
set(BLOCK_SPARSE_COMPRESS "")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  set(BLOCK_SPARSE_COMPRESS --compress-mode=size)
endif()

foreach(target block_sparse_cuda block_sparse_sm80 block_sparse_sm90)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  # relaxed-constexpr: device code calls std::bit_cast, which is constexpr and not marked __device__.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra
      ${BLOCK_SPARSE_COMPRESS}
      $<$<BOOL:${BLOCK_SPARSE_WERROR}>:-Xcompiler=-Werror --Werror=all-warnings>>)
  target_link_libraries(${target} PUBLIC block_sparse_flags)
endforeach()
