# The CPU kernels, compiled once per instruction set level from one source: each an object library
# with flags of its own. The order, from the best to what every machine has, is the one in which
# src/cpu/simd_kernel.cpp chooses.
set(BLOCK_SPARSE_CPU_LEVELS "" CACHE STRING
  "Instruction set levels to build, from the best on; native: those of this machine; empty: all that \
the processor family has")

function(block_sparse_cpu_level name)
  if(BLOCK_SPARSE_CPU_LEVELS STREQUAL "native")
    try_run(RUNS_${name} COMPILES_${name} ${PROJECT_BINARY_DIR}/cpu_supported
      ${PROJECT_SOURCE_DIR}/cmake/cpu_supported.cpp COMPILE_DEFINITIONS ${ARGN}
      CMAKE_FLAGS -DINCLUDE_DIRECTORIES=${PROJECT_SOURCE_DIR}/src)
    if(NOT RUNS_${name} EQUAL 0)
      return()
    endif()
  elseif(BLOCK_SPARSE_CPU_LEVELS AND NOT name IN_LIST BLOCK_SPARSE_CPU_LEVELS)
    return()
  endif()
  add_library(block_sparse_cpu_${name} OBJECT src/cpu/level.cpp)
  target_link_libraries(block_sparse_cpu_${name} PRIVATE block_sparse_flags)
  # contract: a * b + c is one fused instruction where there is one (ISO mode would forbid it).
  # psabi: vectors are only passed between inlined functions.
  # maybe-uninitialized: GCC 12 says it of its own headers (its bug 105593).
  target_compile_options(block_sparse_cpu_${name} PRIVATE
    -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi
    -Wno-maybe-uninitialized ${ARGN})
  target_compile_definitions(block_sparse_cpu_${name} PRIVATE BLOCK_SPARSE_LEVEL=${name})
  target_sources(block_sparse_core PRIVATE $<TARGET_OBJECTS:block_sparse_cpu_${name}>)
  set(LEVELS "${LEVELS} X(${name})" PARENT_SCOPE)
endfunction()

set(LEVELS "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(AVX2 -mavx2 -mfma -mf16c -mbmi2)
  set(AVX512 ${AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  block_sparse_cpu_level(avx512_bf16 ${AVX512} -mavx512bf16)
  block_sparse_cpu_level(avx512 ${AVX512})
  block_sparse_cpu_level(avx2 ${AVX2})
endif()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  block_sparse_cpu_level(neon)  # every machine of the family has it
else()
  block_sparse_cpu_level(baseline)
endif()
set_source_files_properties(src/cpu/simd_kernel.cpp PROPERTIES
  COMPILE_DEFINITIONS "BLOCK_SPARSE_LEVELS=${LEVELS}")
