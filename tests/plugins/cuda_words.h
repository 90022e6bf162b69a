// CUDA's words for functions and memory, as a compiler of the host takes them: for kernels that tests run there.
//
// To be included after CUDA's headers and before the kernel.
#pragma once

#undef __device__
#undef __global__
#undef __shared__
#undef __launch_bounds__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
