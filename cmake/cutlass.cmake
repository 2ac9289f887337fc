# CUTLASS and CuTe, headers only: from CUTLASS_DIR, from the Python package nvidia-cutlass
# (pip install --no-deps nvidia-cutlass==4.2.0.0) or fetched. Gives the target block_sparse_cutlass.
set(CUTLASS_DIR "" CACHE PATH "A checkout of CUTLASS 4.2, or nothing to look for one")
set(BLOCK_SPARSE_CUTLASS_INCLUDE "${CUTLASS_DIR}/include")
if(NOT CUTLASS_DIR)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE SITE_PACKAGES OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(BLOCK_SPARSE_CUTLASS_INCLUDE "${SITE_PACKAGES}/cutlass_library/source/include")
  if(NOT EXISTS "${BLOCK_SPARSE_CUTLASS_INCLUDE}/cutlass/cutlass.h")
    include(FetchContent)
    FetchContent_Declare(cutlass
      GIT_REPOSITORY https://github.com/NVIDIA/cutlass.git GIT_TAG v4.2.0 GIT_SHALLOW ON
      SOURCE_SUBDIR none)  # its headers only, not its build
    FetchContent_MakeAvailable(cutlass)
    set(BLOCK_SPARSE_CUTLASS_INCLUDE "${cutlass_SOURCE_DIR}/include")
  endif()
endif()
if(NOT EXISTS "${BLOCK_SPARSE_CUTLASS_INCLUDE}/cutlass/cutlass.h")
  message(FATAL_ERROR
    "CUTLASS: there is no cutlass/cutlass.h in ${BLOCK_SPARSE_CUTLASS_INCLUDE}; -DCUTLASS_DIR must "
    "name a checkout of CUTLASS 4.2, or be empty")
endif()
message(STATUS "CUTLASS: ${BLOCK_SPARSE_CUTLASS_INCLUDE}")
add_library(block_sparse_cutlass INTERFACE)
target_include_directories(block_sparse_cutlass SYSTEM INTERFACE ${BLOCK_SPARSE_CUTLASS_INCLUDE})
