// In which order the tiles of rows of all kv heads are computed when a fixed number of blocks takes them in
// turn.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"

namespace fastattn::cuda {

// Tile n, of pairs * row_tiles. The last rows have the most keys when causal and go first, so that what is
// left for the end is short; but only within a section of pairs, whose keys and values a second-level cache
// holds.
struct FlashOrder {
    std::int64_t pairs = 0, row_tiles = 0;  // (batch entry, kv head) pairs, tiles of rows of each
    std::int64_t section = 1;  // pairs

    struct Place {
        std::int64_t pair, row_tile;
    };
    FASTATTN_HOST_DEVICE constexpr std::int64_t tiles() const noexcept { return pairs * row_tiles; }
    FASTATTN_HOST_DEVICE constexpr Place place(std::int64_t n) const noexcept {
        const std::int64_t before = n / (section * row_tiles) * section;  // pairs of the sections before
        const std::int64_t here = pairs - before < section ? pairs - before : section;
        const std::int64_t inner = n - before * row_tiles, slow = inner / here;
        return {before + (inner - slow * here), row_tiles - 1 - slow};
    }
};

// Half of the cache for keys and values, each of `bytes_of_pair`; the rest is for queries, results and who
// comes next.
constexpr std::int64_t section_pairs(std::int64_t bytes_of_pair, std::size_t l2_bytes) noexcept {
    const std::int64_t fit =
        static_cast<std::int64_t>(l2_bytes / 2) / (bytes_of_pair > 0 ? bytes_of_pair : 1);
    return fit > 1 ? fit : 1;
}

}  // namespace fastattn::cuda
