// How tiles of 16-bit elements lie in Hopper's shared memory, for TMA to write and wgmma to read (PTX ISA,
// "Shared Memory Matrix Layout" and "Tensor swizzling modes"): pure functions, tested on the host.
//
// A tile of `rows` rows is cut into chunks of 64 columns, one after another; in a chunk a row has 128 bytes,
// and the place of a 16-byte piece within them is turned by the row, so that eight rows of a column lie in
// different banks. A tile begins at a multiple of 1024 bytes, after which the turns repeat.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace fastattn::cuda {

inline constexpr int kChunkColumns = 64, kChunkRowBytes = 128, kSwizzleBytes = 1024;

// Where the byte that would be at `address` without a swizzle is.
FASTATTN_HOST_DEVICE constexpr std::uint32_t swizzled_128(std::uint32_t address) noexcept {
    return address ^ (address >> 3 & 0x70u);
}

// Bytes from a tile's begin to the element (row, column), before the swizzle.
FASTATTN_HOST_DEVICE constexpr std::uint32_t tile_offset(int rows, int row, int column) noexcept {
    return static_cast<std::uint32_t>((column / kChunkColumns * rows + row) * kChunkRowBytes +
                                      column % kChunkColumns * 2);
}

// A matrix descriptor of wgmma with the 128-byte swizzle; addresses and offsets in bytes of shared memory.
FASTATTN_HOST_DEVICE constexpr std::uint64_t matrix_descriptor(std::uint32_t address, std::uint32_t leading,
                                                               std::uint32_t stride) noexcept {
    return std::uint64_t{address >> 4 & 0x3FFFu} | std::uint64_t{leading >> 4 & 0x3FFFu} << 16 |
           std::uint64_t{stride >> 4 & 0x3FFFu} << 32 | std::uint64_t{1} << 62;
}

// The operand whose rows are those of the tile from `row` (a multiple of 8) on, and whose inner dimension is
// the 16 columns from `column` on: q and k. Eight rows are 1024 bytes from the next eight; there is no second
// inner step.
FASTATTN_HOST_DEVICE constexpr std::uint64_t descriptor_of_rows(std::uint32_t tile, int rows, int row,
                                                                int column) noexcept {
    return matrix_descriptor(tile + tile_offset(rows, row, column), 16, kSwizzleBytes);
}

// The transposed one, whose inner dimension is the 16 rows from `row` on: v, all columns. A chunk of 64
// columns is `leading` bytes from the next, eight rows are `stride` bytes from the next eight.
FASTATTN_HOST_DEVICE constexpr std::uint64_t descriptor_of_columns(std::uint32_t tile, int rows,
                                                                   int row) noexcept {
    return matrix_descriptor(tile + tile_offset(rows, row, 0),
                             static_cast<std::uint32_t>(rows * kChunkRowBytes), kSwizzleBytes);
}

// The same matrix `bytes` further on.
FASTATTN_HOST_DEVICE constexpr std::uint64_t advanced(std::uint64_t descriptor,
                                                      std::uint32_t bytes) noexcept {
    return descriptor + (bytes >> 4);
}

}  // namespace fastattn::cuda
