# Sets BLOCK_SPARSE_CUDA to ON where there are both a compiler and a GPU, else to OFF.
find_program(BLOCK_SPARSE_NVCC nvcc HINTS /usr/local/cuda/bin)
find_program(BLOCK_SPARSE_NVIDIA_SMI nvidia-smi)
set(GPUS "")
if(BLOCK_SPARSE_NVIDIA_SMI)
  execute_process(COMMAND ${BLOCK_SPARSE_NVIDIA_SMI} --list-gpus
    OUTPUT_VARIABLE GPUS ERROR_QUIET)
endif()
if(BLOCK_SPARSE_NVCC AND GPUS MATCHES "GPU 0")
  set(BLOCK_SPARSE_CUDA ON)
else()
  set(BLOCK_SPARSE_CUDA OFF)
endif()
message(STATUS "BLOCK_SPARSE_CUDA: ${BLOCK_SPARSE_CUDA} (detected)")
