// Instances of the fused kernel for Hopper, and their launches. The tests compile it as C++ for the emulated
// GPU.
#include "cuda/fused/sm90/kernel.h"
#include "cuda/fused/sm90/launch.h"
#include "cuda/simt/launch_macro.h"

namespace fastattn::cuda {
namespace {

template <class T, class Tile>
int launch(const HopperArgs& a, int blocks, Stream stream) {
    const auto kernel = &flash_forward_sm90<T, Tile>;
    if (const int status = allow_shared_memory(reinterpret_cast<const void*>(kernel), Tile::shared_bytes))
        return status;
    const Index tiles = a.order.tiles();
    FASTATTN_LAUNCH_SHARED((flash_forward_sm90<T, Tile>), tiles < blocks ? tiles : blocks, Tile::threads,
                           Tile::shared_bytes, stream, a);
    return 0;
}

}  // namespace

int launch_flash_sm90(const HopperArgs& a, int tile, int blocks, Stream stream) {
    int number = 0;
#define FASTATTN_HOPPER_TILE(full, ...)                                                     \
    if (tile == number++) {                                                                 \
        using Tile = HopperTile<__VA_ARGS__>;                                               \
        return a.flash.problem.dtype == DType::f16 ? launch<F16, Tile>(a, blocks, stream)   \
                                                   : launch<BF16, Tile>(a, blocks, stream); \
    }
#include "cuda/fused/sm90/tiles.inc"
#undef FASTATTN_HOPPER_TILE
    return kNotSupported;
}

}  // namespace fastattn::cuda
