#include "cuda/fused/sm80/host.h"

#include <algorithm>

#include "cuda/fused/sm80/launch.h"
#include "cuda/host/errors.h"

namespace fastattn::cuda {
namespace {

// The smallest compiled tile that holds both head dimensions; 0: none.
int flash_sm80_width(const AttentionProblem& p) noexcept {
    const Index dims = std::max(p.head_dim, p.value_dim);
#define FASTATTN_FLASH_TILE(width, mt, keys) \
    if (dims <= (width)) return width;
#include "cuda/fused/sm80/tiles.inc"
#undef FASTATTN_FLASH_TILE
    return 0;
}

}  // namespace

void FlashSm80::launch(const FlashArgs& args, std::byte*, Stream stream) const {
    throw_on_error(launch_flash_sm80(args, flash_sm80_width(args.problem), stream),
                   "asking for shared memory");
    throw_on_error(runtime::last_error(), "launching flash_forward");
}

std::string FlashSm80::describe(const AttentionProblem& p, bool) const {
    const int width = flash_sm80_width(p);
#define FASTATTN_FLASH_TILE(tile_width, mt, keys)               \
    if (width == (tile_width))                                  \
        return "fused, tiles of " + std::to_string(64 * (mt)) + \
               " rows x " #keys " keys, head dimensions up to " #tile_width;
#include "cuda/fused/sm80/tiles.inc"
#undef FASTATTN_FLASH_TILE
    return {};
}

}  // namespace fastattn::cuda
