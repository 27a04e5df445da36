#include "cuda/fused/fused_kernel.h"

#include <algorithm>

#include "cuda/fused/launch.h"
#include "cuda/host/errors.h"
#include "cuda/host/operands.h"

namespace fastattn::cuda {

const char* FusedKernel::refuses(const AttentionProblem& p) {
    if (const char* why = refuses_everywhere(p)) return why;
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
                        const KernelMemory& memory, Stream stream) const {
    Carver carver(memory.workspace);
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

}  // namespace fastattn::cuda
