// The backward pass of host arrays through a device, in units of whole kv heads: while one is computed, the next is copied to
// page-locked memory, and the results of the one before to the caller's arrays.
#pragma once

#include "cuda/cublas/backward.h"
#include "cuda/host/unit_arrays.h"
#include "threads/executor.h"

namespace fastattn::cuda {

// Walks a problem in units: some kv heads of a batch entry, or all of some entries, with all their rows and keys.
class BackwardUnits {
public:
    explicit BackwardUnits(const BackwardProblem& b, std::size_t unit_bytes = kUnitBytes) noexcept;
    bool next(Chunk& unit) noexcept;  // false: no more
    Index count() const noexcept;
    Chunk largest() const noexcept;

private:
    const AttentionProblem& p_;
    Chunk all_;
    Index batches_ = 0, kv_heads_ = 0;  // of a unit
    Index batch_ = 0, kv_head_ = 0;
};

// Where the arrays of a unit lie in two blocks: in (q, k, v, ..), out (dq, dk, dv, dbias when it has all axes).
struct BackwardLayout {
    std::size_t k = 0, v = 0, dout = 0, out = 0, lse = 0, dlse = 0, mask = 0, bias = 0, in_bytes = 0;
    std::size_t dk = 0, dv = 0, dbias = 0, out_bytes = 0;
};
BackwardLayout lay_out_unit(const BackwardProblem& b, const Chunk& unit) noexcept;
// The problem with these arrays in the two blocks, addressed by the indices of the whole problem.
BackwardProblem place_unit(const BackwardProblem& b, const Chunk& unit, const BackwardLayout& layout,
                           std::byte* in, std::byte* out) noexcept;

// All of the device's memory that run_staged_backward() takes.
std::size_t staged_backward_bytes(const BackwardProblem& b, const CublasBackward& kernel) noexcept;
// Computes all units; the results are in the host's arrays when it returns. Throws Cancelled when the executor says stop.
void run_staged_backward(const BackwardProblem& b, const DeviceContext& context, const CublasBackward& kernel,
                         Executor& executor);

}  // namespace fastattn::cuda
