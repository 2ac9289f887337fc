# The torch ops, through LibTorch's stable ABI: one build serves every torch from 2.11 on.
find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0])"
  OUTPUT_VARIABLE TORCH_DIRECTORY OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE FAILED)
if(FAILED)
  message(FATAL_ERROR "${Python_EXECUTABLE} cannot import torch, whose headers the build needs: "
    "install torch first and build with --no-build-isolation")
endif()

add_library(block_sparse_torch INTERFACE)
target_compile_definitions(block_sparse_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_include_directories(block_sparse_torch SYSTEM INTERFACE ${TORCH_DIRECTORY}/include)
# Named as needed even where the linker sees no use: libraries are loaded locally, and the symbols
# would stay undefined.
target_link_options(block_sparse_torch INTERFACE -Wl,--no-as-needed -Wl,--exclude-libs,ALL)
target_link_libraries(block_sparse_torch INTERFACE ${TORCH_DIRECTORY}/lib/libtorch_cpu.so)

function(block_sparse_torch_library name)
  add_library(${name} MODULE
    src/torch/products.cpp src/torch/tensors.cpp src/torch/zero.cpp ${ARGN})
  target_link_libraries(${name} PRIVATE block_sparse_flags block_sparse_torch)
  # torch is already loaded by the time that this library is: no run path into its directory.
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON)
  install(TARGETS ${name} LIBRARY DESTINATION pytorch_block_sparse)
endfunction()

block_sparse_torch_library(_C src/torch/cpu.cpp)
target_link_libraries(_C PRIVATE block_sparse_core)
if(BLOCK_SPARSE_CUDA)
  block_sparse_torch_library(_C_cuda src/torch/cuda.cpp)
  target_link_libraries(_C_cuda PRIVATE block_sparse_cuda)
endif()
