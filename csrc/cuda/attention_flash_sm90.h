// Fused attention for Hopper: flash_sm90.h on the device, this on the host.
#pragma once

#include <string>

#include "cuda/context.h"
#include "cuda/staging.h"

namespace fastattn::cuda {

class FlashSm90 final : public DeviceKernel {
public:
    explicit FlashSm90(const DeviceContext& context) : context_(context) {}
    // nullptr, or why not this problem.
    static const char* refuses(const AttentionProblem& p);

    std::size_t workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                const Chunk& region) const override;
    void queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
               std::byte* workspace, Stream stream) const override;
    std::string describe(const AttentionProblem& p, bool staged) const override;

private:
    const DeviceContext& context_;
};

}  // namespace fastattn::cuda
