// Instances of the fused kernels for Ampere and newer, and their launches. The tests compile it as C++ for
// the emulated GPU.
#include "cuda/fused/sm80/launch.h"

#include "cuda/fused/launch.h"
#include "cuda/fused/recompute.h"
#include "cuda/fused/sm80/kernel.h"
#include "cuda/simt/launch_macro.h"

namespace fastattn::cuda {
namespace {

// Calls f with the type of a tile whose head dimension is `width`.
template <class F>
void with_tile(int width, F f) {
    switch (width) {
#define FASTATTN_FLASH_TILE(width, mt, keys) \
    case width: return f(FlashTile<width, mt, keys>{});
#include "cuda/fused/sm80/tiles.inc"
#undef FASTATTN_FLASH_TILE
        default: return;
    }
}

template <class T, class Tile, bool plain>
int launch(const FlashArgs& a, Stream stream) {
    const auto kernel = &flash_forward<T, Tile, plain>;
    if (const int status = allow_shared_memory(reinterpret_cast<const void*>(kernel), Tile::shared_bytes))
        return status;
    const Index tiles = (a.region.rows * a.problem.group + Tile::rows - 1) / Tile::rows;
    FASTATTN_LAUNCH_SHARED((flash_forward<T, Tile, plain>), tiles * a.region.batches * a.region.kv_heads,
                           kFlashThreads, Tile::shared_bytes, stream, a);
    return 0;
}

template <class T>
int launch(const FlashArgs& a, int width, Stream stream) {
    int status = 0;
    with_tile(width, [&](auto tile) {
        using Tile = decltype(tile);
        status =
            is_plain_flash(a.problem) ? launch<T, Tile, true>(a, stream) : launch<T, Tile, false>(a, stream);
    });
    return status;
}

}  // namespace

int launch_flash_sm80(const FlashArgs& a, int width, Stream stream) {
    return a.problem.dtype == DType::f16 ? launch<F16>(a, width, stream) : launch<BF16>(a, width, stream);
}

void launch_recompute(const FlashArgs& a, Stream stream) {
    const Index rows = a.region.rows * a.problem.group * a.region.kv_heads * a.region.batches;
    const Index blocks = (rows + kRecomputeBlock / 32 - 1) / (kRecomputeBlock / 32);
    if (a.problem.dtype == DType::f16) {
        FASTATTN_LAUNCH((recompute_rows<F16>), blocks, kRecomputeBlock, stream, a);
    } else {
        FASTATTN_LAUNCH((recompute_rows<BF16>), blocks, kRecomputeBlock, stream, a);
    }
}

}  // namespace fastattn::cuda
