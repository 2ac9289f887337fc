// The order of two launches that overlap, on Hopper: device instructions. The second one is
// launched with cudaLaunchAttributeProgrammaticStreamSerialization.
#pragma once

namespace block_sparse::cuda::ptx {

// From Hopper on the next kernel may start before this one has ended: it then waits, before it
// reads what this one writes. Elsewhere it starts when this one has ended, and both do nothing.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace block_sparse::cuda::ptx
