// Fused attention on tensor cores: flash_sm80.h on the device, this on the host.
#pragma once

#include <string>

#include "cuda/context.h"
#include "cuda/staging.h"

namespace fastattn::cuda {

class FlashSm80 final : public DeviceKernel {
public:
    explicit FlashSm80(const DeviceContext& context) : context_(context) {}
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

// The smallest compiled tile that holds both head dimensions; 0: none.
int flash_sm80_width(const AttentionProblem& p) noexcept;

}  // namespace fastattn::cuda
