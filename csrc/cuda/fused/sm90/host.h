// Fused attention for Hopper: kernel.h on the device, this on the host.
#pragma once

#include <string>

#include "cuda/fused/fused_kernel.h"

namespace fastattn::cuda {

class FlashSm90 final : public FusedKernel {
public:
    static constexpr int kLeast = 90, kMost = 90;  // the instructions of 9.0a: nothing newer has them
#if defined(FASTATTN_HAS_SM90A)
    static constexpr bool kBuilt = true;
#else
    static constexpr bool kBuilt = false;
#endif
    explicit FlashSm90(const DeviceContext& context) : FusedKernel(context) {}
    // nullptr, or why not this problem.
    static const char* refuses(const AttentionProblem& p) { return FusedKernel::refuses(p); }
    std::string describe(const AttentionProblem& p, bool staged) const override;

private:
    void launch(const FlashArgs& args, std::byte* scratch, Stream stream) const override;
};

}  // namespace fastattn::cuda
