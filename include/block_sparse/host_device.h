// Marks the few functions that the CPU and the GPU share. Includes nothing of CUDA.
#pragma once

#ifdef __CUDACC__
#define BLOCK_SPARSE_HOST_DEVICE __host__ __device__
#else
#define BLOCK_SPARSE_HOST_DEVICE
#endif
