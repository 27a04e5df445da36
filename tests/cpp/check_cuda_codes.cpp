// Compiled where CUDA's headers are, run never: the codes that csrc/cuda/runtime.h spells out are NVIDIA's.
#include <driver_types.h>

#include "cuda/runtime.h"

namespace fastattn::cuda {

static_assert(kNoMemory == cudaErrorMemoryAllocation);
static_assert(kInsufficientDriver == cudaErrorInsufficientDriver);
static_assert(kNoDevice == cudaErrorNoDevice);
static_assert(kNotReady == cudaErrorNotReady);
static_assert(kNotSupported == cudaErrorNotSupported);

static_assert(sizeof(Stream) == sizeof(cudaStream_t));
static_assert(sizeof(Event) == sizeof(cudaEvent_t));
static_assert(sizeof(Pool) == sizeof(cudaMemPool_t));

}  // namespace fastattn::cuda
