// Instances of the kernels for few query rows, and their launches. The tests compile it as C++ for the
// emulated GPU.
#include "cuda/fused/decode/launch.h"

#include "cuda/fused/decode/kernel.h"
#include "cuda/fused/decode/merge_splits.h"
#include "cuda/simt/launch_macro.h"

namespace fastattn::cuda {
namespace {

// Calls f with the type of a tile of these sizes.
template <class F>
void with_tile(int width, int mt, F f) {
#define FASTATTN_DECODE_TILE(tile_width, tile_mt, slots) \
    if (width == (tile_width) && mt == (tile_mt)) return f(DecodeTile<tile_width, tile_mt, slots>{});
#include "cuda/fused/decode/tiles.inc"
#undef FASTATTN_DECODE_TILE
}

template <class T, class Tile, bool plain>
int launch(const DecodeArgs& a, Stream stream) {
    const auto kernel = &decode_forward<T, Tile, plain>;
    if (const int status = allow_shared_memory(reinterpret_cast<const void*>(kernel), Tile::shared_bytes))
        return status;
    const Chunk& region = a.flash.region;
    const Index tiles = (region.rows * a.flash.problem.group + Tile::rows - 1) / Tile::rows;
    FASTATTN_LAUNCH_SHARED((decode_forward<T, Tile, plain>),
                           tiles * region.batches * region.kv_heads * a.pieces.count, kDecodeThreads,
                           Tile::shared_bytes, stream, a);
    return 0;
}

template <class T>
int launch(const DecodeArgs& a, int width, int mt, Stream stream) {
    int status = 0;
    with_tile(width, mt, [&](auto tile) {
        using Tile = decltype(tile);
        status = is_plain_flash(a.flash.problem) ? launch<T, Tile, true>(a, stream)
                                                 : launch<T, Tile, false>(a, stream);
    });
    return status;
}

}  // namespace

int launch_decode(const DecodeArgs& a, int width, int mt, Stream stream) {
    return a.flash.problem.dtype == DType::f16 ? launch<F16>(a, width, mt, stream)
                                               : launch<BF16>(a, width, mt, stream);
}

void launch_merge_splits(const DecodeArgs& a, Stream stream) {
    const Chunk& region = a.flash.region;
    const Index rows = region.rows * a.flash.problem.group * region.kv_heads * region.batches;
    if (a.flash.problem.dtype == DType::f16) {
        FASTATTN_LAUNCH((merge_splits<F16>), rows, kMergeBlock, stream, a);
    } else {
        FASTATTN_LAUNCH((merge_splits<BF16>), rows, kMergeBlock, stream, a);
    }
}

}  // namespace fastattn::cuda
