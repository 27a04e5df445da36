// The backward pass by five products of cuBLAS with a kernel between them, chunk by chunk, on one device and in one stream.
//
//   S  (rows, keys) = q k^T        dP (rows, keys) = dout v^T     raw products, in f64 for f64, else f32
//   P  (rows, keys)                dS (rows, keys)                in the problem's dtype, over S and dP
//   dv += P^T dout                 dk += dS^T q                   sums over the chunks of rows, in order, in f64 or f32
//   dq  = dS k                                                    of all keys at once
//
// A call is one region, or several one after another. What is summed over all of it (dbias unless it has all axes of the
// scores, dalibi_slopes, dsinks) lies in a block of its own from queue_start() to queue_finish().
#pragma once

#include <string>

#include "cuda/blas/library.h"
#include "cuda/host/chunking.h"
#include "cuda/host/context.h"

namespace fastattn::cuda {

class CublasBackward {
public:
    CublasBackward(const DeviceContext& context, bool tf32)
        : context_(context), gemm_(cublas::plans_of(context)), tf32_(tf32) {}
    // nullptr, or why not this problem.
    static const char* refuses(const BackwardProblem& b);

    // `device` has the addresses of the device in the indices of the whole problem; `host` is the same problem with what the host
    // can read of lengths and offsets. A region has all rows and keys of its heads.
    std::size_t workspace_bytes(const BackwardProblem& host, const BackwardProblem& device,
                                const Chunk& region) const;
    void queue_start(const BackwardProblem& device, std::byte* sums, Stream stream) const;
    void queue(const BackwardProblem& host, const BackwardProblem& device, const Chunk& region,
               std::byte* workspace, std::byte* sums, Stream stream) const;
    void queue_finish(const BackwardProblem& device, std::byte* sums, Stream stream) const;
    // What is there only once, whatever the regions.
    std::string describe(const BackwardProblem& b) const;

private:
    // Bytes of one matrix of scores.
    std::size_t limit(const BackwardProblem& b) const noexcept;

    const DeviceContext& context_;
    GemmPlans& gemm_;
    const bool tf32_;
};

// Bytes of the sums over a call.
std::size_t sums_bytes(const BackwardProblem& b) noexcept;
// Whether every element of dbias is one dS, so that it is written and not summed.
bool has_all_axes(const ScoreOperand& dbias, const AttentionProblem& p) noexcept;

}  // namespace fastattn::cuda
