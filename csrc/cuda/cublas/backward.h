// The backward pass by five products of cuBLAS with a kernel between them, chunk by chunk, on one device and
// in one stream.
//
//   S  (rows, keys) = q k^T        dP (rows, keys) = dout v^T     raw products, in f64 for f64, else f32
//   P  (rows, keys)                dS (rows, keys)                in the problem's dtype, over S and dP
//   dv += P^T dout                 dk += dS^T q                   sums over chunks, in order, in f64 or f32
//   dq  = dS k                                                    of all keys at once
//
// A call is one region, or several one after another. What is summed over all of it (dbias unless it has all
// axes of the scores, dalibi_slopes, dsinks) lies in a block of its own from queue_start() to queue_finish().
#pragma once

#include <string>

#include "cuda/blas/library.h"
#include "cuda/host/chunking.h"
#include "cuda/host/context.h"
#include "cuda/host/device_kernel.h"

namespace fastattn::cuda {

// A region has all rows and keys of its heads.
class CublasBackward final : public DeviceKernel<BackwardProblem> {
public:
    CublasBackward(const DeviceContext& context, bool tf32)
        : context_(context), gemm_(cublas::plans_of(context)), tf32_(tf32) {}
    // nullptr, or why not this problem.
    static const char* refuses(const BackwardProblem& b);

    std::size_t workspace_bytes(const BackwardProblem& host, const BackwardProblem& device,
                                const Chunk& region) const override;
    void queue(const BackwardProblem& host, const BackwardProblem& device, const Chunk& region,
               const KernelMemory& memory, Stream stream) const override;
    std::size_t sums_bytes(const BackwardProblem& b) const override;
    void queue_start(const BackwardProblem& device, std::byte* sums, Stream stream) const override;
    void queue_finish(const BackwardProblem& device, std::byte* sums, Stream stream) const override;
    std::string describe(const BackwardProblem& b, bool staged) const override;

private:
    // Bytes of one matrix of scores.
    std::size_t limit(const BackwardProblem& b) const noexcept;

    const DeviceContext& context_;
    GemmPlans& gemm_;
    const bool tf32_;
};

}  // namespace fastattn::cuda
