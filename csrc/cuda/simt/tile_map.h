// Arrays as the copy engine of Hopper (TMA) sees them.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// CUtensorMap: opaque, made by runtime::encode_tile_map(). CUDA 12 aligns it to 64 bytes, CUDA 13 to 128.
struct alignas(128) TensorMap {
    unsigned char bytes[128];
};

// A four-dimensional array of 16-bit elements, neighbours in axis 0, and the box of it that one copy brings:
// 64 elements of axis 0 by `rows` of axis 1, written as a chunk of hopper_layout.h. What lies outside of the
// array comes as zeros.
struct TileMapLayout {
    void* data = nullptr;  // a multiple of 16
    bool bf16 = false;  // else f16
    std::uint64_t size[4] = {};
    std::uint64_t stride[3] = {};  // bytes, of axes 1 to 3: multiples of 16 below 2^40
    std::uint32_t rows = 0;  // at most 256
};

// Of the driver's cuTensorMapEncodeTiled.
namespace tile_map_codes {
inline constexpr int kF16 = 6, kBf16 = 9;  // CUtensorMapDataType
inline constexpr int kNoInterleave = 0, kSwizzle128 = 3, kPromote256 = 3, kFillZeros = 0;
}  // namespace tile_map_codes

}  // namespace fastattn::cuda
