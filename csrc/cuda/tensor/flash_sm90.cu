// Instances of the fused kernel for Hopper, and their launches. The tests compile it as C++ for the emulated GPU.
#include "cuda/simt/launch_macro.h"
#include "cuda/tensor/flash_sm90.h"
#include "cuda/tensor/launch_flash.h"

namespace fastattn::cuda {
namespace {

template <class T, class Tile, bool plain>
int launch(const HopperArgs& a, int blocks, Stream stream) {
    const auto kernel = &flash_forward_sm90<T, Tile, plain>;
    if (const int status = allow_shared_memory(reinterpret_cast<const void*>(kernel), Tile::shared_bytes))
        return status;
    const Index tiles = a.order.tiles();
    FASTATTN_LAUNCH_SHARED((flash_forward_sm90<T, Tile, plain>), tiles < blocks ? tiles : blocks,
                           Tile::threads, Tile::shared_bytes, stream, a);
    return 0;
}

template <class Tile>
int launch(const HopperArgs& a, int blocks, Stream stream) {
    const bool plain = is_plain_flash(a.flash.problem);
    if (a.flash.problem.dtype == DType::f16)
        return plain ? launch<F16, Tile, true>(a, blocks, stream)
                     : launch<F16, Tile, false>(a, blocks, stream);
    return plain ? launch<BF16, Tile, true>(a, blocks, stream) : launch<BF16, Tile, false>(a, blocks, stream);
}

}  // namespace

int launch_flash_sm90(const HopperArgs& a, int width, int blocks, Stream stream) {
    switch (width) {
#define FASTATTN_HOPPER_TILE(width, value_width, groups, keys, loader, registers, polynomial)       \
    case width:                                                                                     \
        return launch<HopperTile<width, value_width, groups, keys, loader, registers, polynomial>>( \
            a, blocks, stream);
#include "cuda/tensor/flash_sm90_tiles.inc"
#undef FASTATTN_HOPPER_TILE
        default: return 0;
    }
}

}  // namespace fastattn::cuda
