// Fused attention for few query rows: kernel.h on the device, this on the host.
#pragma once

#include <string>

#include "cuda/fused/fused_kernel.h"

namespace fastattn::cuda {

class FlashDecode final : public FusedKernel {
public:
    static constexpr int kLeast = 80, kMost = 1000;
    static constexpr bool kBuilt = true;
    explicit FlashDecode(const DeviceContext& context) : FusedKernel(context) {}
    // nullptr, or why not this problem.
    static const char* refuses(const AttentionProblem& p);
    std::string describe(const AttentionProblem& p, bool staged) const override;

private:
    std::size_t scratch_bytes(const AttentionProblem& host, const Chunk& region) const override;
    void launch(const FlashArgs& args, std::byte* scratch, Stream stream) const override;
};

}  // namespace fastattn::cuda
