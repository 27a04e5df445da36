// Fused attention on tensor cores, on the host: what its kernels share, and flash_sm80.h.
#pragma once

#include <string>

#include "cuda/context.h"
#include "cuda/staging.h"
#include "cuda/tensor/flash_arguments.h"

namespace fastattn::cuda {

// What the fused kernels have in common: operands as their asynchronous copies can read them, and rows into which a masked NaN
// leaked computed again. A kernel says how it is launched, what memory it needs beside that, and as kLeast and kMost which
// compute capabilities it runs on, 80 for 8.0, and as kBuilt whether this build has code for them.
class FusedKernel : public DeviceKernel {
public:
    std::size_t workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                const Chunk& region) const final;
    void queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
               std::byte* workspace, Stream stream) const final;

protected:
    explicit FusedKernel(const DeviceContext& context) : context_(context) {}
    // nullptr, or why none of them takes this problem.
    static const char* refuses(const AttentionProblem& p);

    // Bytes that launch() gets; they grow with the region.
    virtual std::size_t scratch_bytes(const AttentionProblem&, const Chunk&) const { return 0; }
    // Throws CudaError.
    virtual void launch(const FlashArgs& args, std::byte* scratch, Stream stream) const = 0;

    const DeviceContext& context_;
};

class FlashSm80 final : public FusedKernel {
public:
    static constexpr int kLeast = 80, kMost = 1000;
    static constexpr bool kBuilt = true;
    explicit FlashSm80(const DeviceContext& context) : FusedKernel(context) {}
    // nullptr, or why not this problem.
    static const char* refuses(const AttentionProblem& p) { return FusedKernel::refuses(p); }
    std::string describe(const AttentionProblem& p, bool staged) const override;

private:
    void launch(const FlashArgs& args, std::byte* scratch, Stream stream) const override;
};

// The smallest compiled tile that holds both head dimensions; 0: none.
int flash_sm80_width(const AttentionProblem& p) noexcept;

}  // namespace fastattn::cuda
