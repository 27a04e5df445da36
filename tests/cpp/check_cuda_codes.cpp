// Compiled where CUDA's headers are, run never: the codes that csrc/cuda/simt/runtime.h spells out are
// NVIDIA's.
#include <driver_types.h>

#if __has_include(<cuda.h>)
#include <cuda.h>
#define FASTATTN_HAS_DRIVER_HEADER 1
#endif

#include "cuda/simt/runtime.h"
#include "cuda/simt/tile_map.h"

namespace fastattn::cuda {

static_assert(kNoMemory == cudaErrorMemoryAllocation);
static_assert(kInsufficientDriver == cudaErrorInsufficientDriver);
static_assert(kNoDevice == cudaErrorNoDevice);
static_assert(kNotReady == cudaErrorNotReady);
static_assert(kNotSupported == cudaErrorNotSupported);

static_assert(sizeof(Stream) == sizeof(cudaStream_t));
static_assert(sizeof(Event) == sizeof(cudaEvent_t));
static_assert(sizeof(Pool) == sizeof(cudaMemPool_t));

#if defined(FASTATTN_HAS_DRIVER_HEADER)
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
static_assert(tile_map_codes::kF16 == CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
static_assert(tile_map_codes::kBf16 == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
static_assert(tile_map_codes::kNoInterleave == CU_TENSOR_MAP_INTERLEAVE_NONE);
static_assert(tile_map_codes::kSwizzle128 == CU_TENSOR_MAP_SWIZZLE_128B);
static_assert(tile_map_codes::kPromote256 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
static_assert(tile_map_codes::kFillZeros == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);

// Compiles where the function's parameters are what runtime_cudart.cpp takes them for.
[[maybe_unused]] static CUresult encode(void* map, int type, unsigned rank, void* data,
                                        const std::uint64_t* size, const std::uint64_t* stride,
                                        const unsigned* box, const unsigned* step, int interleave,
                                        int swizzle, int promotion, int fill) {
    static_assert(sizeof(CUtensorMapDataType) == sizeof(int) && sizeof(CUresult) == sizeof(int));
    static_assert(sizeof(cuuint64_t) == sizeof(std::uint64_t) && sizeof(cuuint32_t) == sizeof(unsigned));
    return cuTensorMapEncodeTiled(
        static_cast<CUtensorMap*>(map), static_cast<CUtensorMapDataType>(type), rank, data, size, stride, box,
        step, static_cast<CUtensorMapInterleave>(interleave), static_cast<CUtensorMapSwizzle>(swizzle),
        static_cast<CUtensorMapL2promotion>(promotion), static_cast<CUtensorMapFloatOOBfill>(fill));
}
#endif

}  // namespace fastattn::cuda
