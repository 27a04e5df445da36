// Host arrays through a device: the call is cut into units (heads, or rows of a head); while one is computed, the next is
// copied to page-locked memory and uploaded, and the one before comes back.
#pragma once

#include <string>

#include "cuda/host/chunking.h"
#include "cuda/host/context.h"
#include "cuda/host/unit_arrays.h"
#include "threads/executor.h"

namespace fastattn::cuda {

// ---- units: pure functions ------------------------------------------------------------------------------
// Walks a problem in units, each a range of rows of some heads, or all rows of all heads of some batch entries.
class Units {
public:
    explicit Units(const AttentionProblem& p, std::size_t unit_bytes = kUnitBytes) noexcept;
    // false: no more. `same_keys`: k and v are those of the unit before.
    bool next(Chunk& unit, bool& same_keys) noexcept;
    std::int64_t count() const noexcept;
    Chunk largest() const noexcept { return {0, batches_, 0, kv_heads_, 0, rows_, all_.key, all_.keys}; }

private:
    const AttentionProblem& p_;
    Chunk all_;
    Index batches_ = 1, kv_heads_ = 1, rows_ = 1;
    Index batch_ = 0, kv_head_ = 0, row_ = 0;
};

// Where the arrays of a unit lie in three blocks: keys (k, v), in (q, mask, bias), out (out, lse, weights).
struct UnitLayout {
    std::size_t v = 0, keys_bytes = 0;
    std::size_t mask = 0, bias = 0, in_bytes = 0;
    std::size_t lse = 0, weights = 0, out_bytes = 0;
};
UnitLayout lay_out_unit(const AttentionProblem& p, const Chunk& unit) noexcept;
// The problem with these arrays in the three blocks, addressed by the indices of the whole problem.
AttentionProblem place_unit(const AttentionProblem& p, const Chunk& unit, const UnitLayout& layout,
                            std::byte* keys, std::byte* in, std::byte* out) noexcept;

// ---- small arrays beside q, k and v -----------------------------------------------------------------------
// Bytes of device memory for the side arrays that are on the host (with `with_scores`, mask and bias too).
std::size_t side_bytes(const AttentionProblem& p, bool with_scores) noexcept;
// Copies them to `block` and puts their addresses there into `device`.
void upload_sides(const AttentionProblem& p, bool with_scores, std::byte* block, AttentionProblem& device,
                  Stream stream, Executor& executor);

// A kernel of the device: what it needs for a region of a problem and how it is queued. `device` has the addresses of the device in the
// indices of the whole problem; `host` is the same problem with what the host can read of lengths and offsets.
class DeviceKernel {
public:
    virtual ~DeviceKernel() = default;
    // Grows with the region: what suffices for one suffices for every smaller one.
    virtual std::size_t workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                        const Chunk& region) const = 0;
    virtual void queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                       std::byte* workspace, Stream stream) const = 0;
    virtual std::string describe(const AttentionProblem& p, bool staged) const = 0;
};

// Device memory that run_staged takes beside `workspace_bytes` for the kernel.
std::size_t staged_bytes(const AttentionProblem& p) noexcept;
// Computes all units; the results are in the host's arrays when it returns. Throws Cancelled when the executor says stop.
void run_staged(const AttentionProblem& p, const DeviceContext& context, std::size_t workspace_bytes,
                const DeviceKernel& kernel, Executor& executor);

}  // namespace fastattn::cuda
