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

const char* FusedKernel::refuses(const AttentionProblem& p) {
    if (p.weights.data != nullptr) return "does not return the weights";
    if (p.head_dim % 8 != 0 || p.value_dim % 8 != 0) return "takes head dimensions that are multiples of 8";
    if (std::max(p.head_dim, p.value_dim) > 256) return "takes head dimensions up to 256";
    constexpr Index most = (Index{1} << 31) - 1024;
    return whole(p).keys > most ? "a row attends more than 2**31 keys" : nullptr;
}

std::size_t FusedKernel::workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                         const Chunk& region) const {
    Carver carver(nullptr);
    const RegionOperands operands(host, device, region, carver);
    carver.take(scratch_bytes(host, region));
    return carver.used();
}

void FusedKernel::queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                        std::byte* workspace, Stream stream) const {
    Carver carver(workspace);
    const RegionOperands operands(host, device, region, carver);
    std::byte* const scratch = carver.take(scratch_bytes(host, region));
    operands.queue_copies_in(stream);
    const FlashArgs args{operands.problem(), region};
    launch(args, scratch, stream);
    if (is_restricted(host)) {
        launch_recompute(args, stream);
        throw_on_error(runtime::last_error(), "launching recompute_rows");
    }
    operands.queue_copies_out(stream);
}

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
#include "cuda/tensor/flash_sm80_tiles.inc"
#undef FASTATTN_FLASH_TILE
    return {};
}

}  // namespace fastattn::cuda
