// Attention by two products of cuBLAS with a softmax between them, chunk by chunk, on one device and in one
// stream.
//
//   S (rows, keys) = q k^T        raw products, in f64 for f64, else f32
//   P (rows, keys) = softmax(S)   in the problem's dtype, over S
//   out (rows, Dv) = P v
//
// Scores of a chunk stay in the second-level cache; the Sq x Sk array of a head never exists whole unless it
// is small.
#pragma once

#include <string>

#include "cuda/blas/library.h"
#include "cuda/host/chunking.h"
#include "cuda/host/context.h"
#include "cuda/host/device_kernel.h"

namespace fastattn::cuda {

class CublasAttention final : public DeviceKernel<AttentionProblem> {
public:
    CublasAttention(const DeviceContext& context, bool tf32)
        : context_(context), gemm_(cublas::plans_of(context)), tf32_(tf32) {}
    std::size_t workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                const Chunk& region) const override;
    void queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
               const KernelMemory& memory, Stream stream) const override;
    std::string describe(const AttentionProblem& p, bool staged) const override;

private:
    std::size_t limit() const noexcept { return score_limit(context_.properties.l2_bytes); }

    const DeviceContext& context_;
    GemmPlans& gemm_;
    const bool tf32_;
};

}  // namespace fastattn::cuda
