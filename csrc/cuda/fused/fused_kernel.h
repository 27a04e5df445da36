// Fused attention on tensor cores, on the host: what its kernels share.
#pragma once

#include <string>

#include "cuda/fused/arguments.h"
#include "cuda/host/chunking.h"
#include "cuda/host/context.h"
#include "cuda/host/device_kernel.h"

namespace fastattn::cuda {

// What the fused kernels have in common: operands as their asynchronous copies can read them, and rows into
// which a masked NaN leaked computed again. A kernel says how it is launched, what memory it needs beside
// that, and as kLeast and kMost which compute capabilities it runs on, 80 for 8.0, and as kBuilt whether this
// build has code for them.
class FusedKernel : public DeviceKernel<AttentionProblem> {
public:
    std::size_t workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                const Chunk& region) const final;
    void queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
               const KernelMemory& memory, Stream stream) const final;

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

}  // namespace fastattn::cuda
