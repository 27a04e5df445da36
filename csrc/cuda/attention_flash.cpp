#include "cuda/attention_flash.h"

#include <algorithm>

#include "cuda/errors.h"
#include "cuda/operands.h"
#include "cuda/tensor/launch_flash.h"

namespace fastattn::cuda {

int flash_sm80_width(const AttentionProblem& p) noexcept {
    const Index dims = std::max(p.head_dim, p.value_dim);
#define FASTATTN_FLASH_TILE(width, mt, keys) \
    if (dims <= (width)) return width;
#include "cuda/tensor/flash_sm80_tiles.inc"
#undef FASTATTN_FLASH_TILE
    return 0;
}

const char* FlashSm80::refuses(const AttentionProblem& p) {
    if (p.weights.data != nullptr) return "does not return the weights";
    if (p.head_dim % 8 != 0 || p.value_dim % 8 != 0) return "takes head dimensions that are multiples of 8";
    if (flash_sm80_width(p) == 0) return "takes head dimensions up to 256";
    constexpr Index most = (Index{1} << 31) - 1024;
    return whole(p).keys > most ? "a row attends more than 2**31 keys" : nullptr;
}

std::size_t FlashSm80::workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                       const Chunk& region) const {
    Carver carver(nullptr);
    const RegionOperands operands(host, device, region, carver);
    return carver.used();
}

void FlashSm80::queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                      std::byte* workspace, Stream stream) const {
    if (context_.properties.major < 8)
        throw UnsupportedError("kernel: \"cuda-flash-sm80\" needs compute capability 8.0, " +
                               std::string(context_.properties.name) + " has " +
                               std::to_string(context_.properties.major) + "." +
                               std::to_string(context_.properties.minor));
    Carver carver(workspace);
    const RegionOperands operands(host, device, region, carver);
    operands.queue_copies_in(stream);
    const FlashArgs args{operands.problem(), region};
    throw_on_error(launch_flash_sm80(args, flash_sm80_width(host), stream), "asking for shared memory");
    throw_on_error(runtime::last_error(), "launching flash_forward");
    if (is_restricted(host)) {
        launch_recompute(args, stream);
        throw_on_error(runtime::last_error(), "launching recompute_rows");
    }
    operands.queue_copies_out(stream);
}

std::string FlashSm80::describe(const AttentionProblem& p, bool) const {
    const int width = flash_sm80_width(p);
#define FASTATTN_FLASH_TILE(tile_width, mt, keys)               \
    if (width == (tile_width))                                  \
        return "fused, tiles of " + std::to_string(64 * (mt)) + \
               " rows x " #keys " keys, head dimensions up to " #tile_width;
#include "cuda/tensor/flash_sm80_tiles.inc"
#undef FASTATTN_FLASH_TILE
    return {};
}

}  // namespace fastattn::cuda
