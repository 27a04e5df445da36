#include "cuda/fused/sm90/host.h"

#include <algorithm>
#include <cstddef>
#include <iterator>

#include "cuda/fused/sm90/launch.h"
#include "cuda/host/errors.h"
#include "cuda/host/operands.h"

namespace fastattn::cuda {
namespace {

// A compiled tile, a row of tiles.inc.
struct TileSizes {
    bool full, plain;
    int width, value_width, keys, rows;
};
constexpr TileSizes kTiles[] = {
#define FASTATTN_HOPPER_TILE(full, plain, width, value_width, keys, groups, loader_registers, registers, \
                             polynomial)                                                                 \
    {full, plain, width, value_width, keys, 64 * (groups)},
#include "cuda/fused/sm90/tiles.inc"
#undef FASTATTN_HOPPER_TILE
};

// The first that holds both head dimensions, which are at most 256.
std::size_t tile_of(const AttentionProblem& p) noexcept {
    const bool plain = is_plain_flash(p);
    const bool full = !p.causal && p.window_left < 0 && p.window_right < 0;
    const auto fits = [&](const TileSizes& tile) {
        return tile.plain == plain && (full || !tile.full) && p.head_dim <= tile.width &&
               p.value_dim <= tile.value_width;
    };
    return static_cast<std::size_t>(std::ranges::find_if(kTiles, fits) - std::begin(kTiles));
}

TileMap tile_map(const AttentionProblem& p, const Chunk& region, const Operand& x, Index dims, int rows) {
    TileMap map;
    if (region.keys == 0) return map;  // never looked at
    TileMapLayout layout;
    layout.data = element(x, p.dtype, region.batch, region.key, region.kv_head);
    layout.bf16 = p.dtype == DType::bf16;
    layout.rows = static_cast<std::uint32_t>(rows);
    // Of an axis that is the same memory again and again the copy engine sees one entry.
    const auto set_axis = [&](int axis, Index size, Index stride) {
        const bool repeats = stride == 0;
        layout.size[axis] = static_cast<std::uint64_t>(repeats ? 1 : size);
        layout.stride[axis - 1] =
            static_cast<std::uint64_t>(size == 1 || repeats ? round_up(2 * dims, 16) : 2 * stride);
        return repeats ? 0 : 1;
    };
    layout.size[0] = static_cast<std::uint64_t>(dims);
    set_axis(1, region.keys, x.seq);
    map.head_step = set_axis(2, region.kv_heads, x.head);
    map.batch_step = set_axis(3, region.batches, x.batch);
    throw_on_error(runtime::encode_tile_map(layout, &map.map), "describing k or v to the copy engine");
    return map;
}

}  // namespace

void FlashSm90::launch(const FlashArgs& flash, std::byte*, Stream stream) const {
    const AttentionProblem& p = flash.problem;
    const Chunk& region = flash.region;
    const std::size_t number = tile_of(p);
    const TileSizes& tile = kTiles[number];
    HopperArgs args;
    args.flash = flash;
    args.order.pairs = region.batches * region.kv_heads;
    args.order.row_tiles = (region.rows * p.group + tile.rows - 1) / tile.rows;
    args.order.section =
        section_pairs(region.keys * (p.head_dim + p.value_dim) * static_cast<Index>(item_size(p.dtype)),
                      context_.properties.l2_bytes);
    args.k = tile_map(p, region, p.k, p.head_dim, tile.keys);
    args.v = tile_map(p, region, p.v, p.value_dim, tile.keys);
    throw_on_error(
        launch_flash_sm90(args, static_cast<int>(number), context_.properties.multiprocessors, stream),
        "asking for shared memory");
    throw_on_error(runtime::last_error(), "launching flash_forward_sm90");
}

std::string FlashSm90::describe(const AttentionProblem& p, bool) const {
    const TileSizes& tile = kTiles[tile_of(p)];
    return "fused, tiles of " + std::to_string(tile.rows) + " rows x " + std::to_string(tile.keys) +
           " keys, head dimensions up to " + std::to_string(tile.width) + " and " +
           std::to_string(tile.value_width);
}

}  // namespace fastattn::cuda
