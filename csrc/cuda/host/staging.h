// Host arrays through a device: the call is cut into units (heads, or rows of a head); while one is computed,
// the next is copied to page-locked memory and uploaded, and the one before comes back.
#pragma once

#include "cuda/host/context.h"
#include "cuda/host/device_kernel.h"
#include "cuda/host/unit_arrays.h"

namespace fastattn::cuda {

// ---- units: pure functions ------------------------------------------------------------------------------
// Walks a problem in units: each has some rows of some heads of an entry, or all rows of all heads of some
// entries. A backward pass is not cut along the rows, over which dk and dv are sums.
class Units {
public:
    explicit Units(const AttentionProblem& p, std::size_t unit_bytes = kUnitBytes) noexcept;
    explicit Units(const BackwardProblem& b, std::size_t unit_bytes = kUnitBytes) noexcept;
    // false: no more. `same_keys`: k and v are those of the unit before.
    bool next(Chunk& unit, bool& same_keys) noexcept;
    std::int64_t count() const noexcept;
    Chunk largest() const noexcept { return {0, batches_, 0, kv_heads_, 0, rows_, all_.key, all_.keys}; }

private:
    void set_heads(Index bytes_of_head, std::size_t unit_bytes) noexcept;

    const AttentionProblem& p_;
    Chunk all_;
    Index batches_ = 0, kv_heads_ = 0, rows_;  // of a unit; 0: there is none
    Index batch_ = 0, kv_head_ = 0, row_ = 0;
};

// ---- calls ----------------------------------------------------------------------------------------------
// Copies the arrays of Travel::side to `block`, where they lie as in lay_out() of the whole problem, and puts
// their addresses there into `device`.
template <class Problem>
void upload_sides(const Problem& p, std::byte* block, Problem& device, Stream stream, Executor& executor);

// All of the device's memory that run_staged() takes.
template <class Problem>
std::size_t staged_bytes(const Problem& p, const DeviceKernel<Problem>& kernel);
// Computes all units; the results are in the host's arrays when it returns. Throws Cancelled when the
// executor says stop.
template <class Problem>
void run_staged(const Problem& p, const DeviceContext& context, const DeviceKernel<Problem>& kernel,
                Executor& executor);

}  // namespace fastattn::cuda
