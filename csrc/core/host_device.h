// FASTATTN_HOST_DEVICE marks small functions that CPU code and CUDA kernels share, so that each rule stands
// once.
#pragma once

#if defined(__CUDACC__)
#define FASTATTN_HOST_DEVICE __host__ __device__
#else
#define FASTATTN_HOST_DEVICE
#endif
