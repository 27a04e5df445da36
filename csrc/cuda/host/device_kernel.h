// A kernel of the device, as the staging pipeline and calls on device arrays know it.
#pragma once

#include <cstddef>
#include <string>

#include <fastattn/attention.h>

#include "cuda/host/packed.h"
#include "cuda/simt/chunk.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

inline const char* refuses_conditions(const AttentionProblem& p) noexcept {
    if (p.paged()) return "reads keys in one piece, not in pages";
    return p.condition_count > 0 ? "takes masks as bool arrays (a Mask: its to_bool(Sq, Sk))" : nullptr;
}

// What no kernel of the device takes, or nullptr.
inline const char* refuses_everywhere(const AttentionProblem& p) noexcept {
    if (const char* why = refuses_packed(p)) return why;
    if (const char* why = refuses_conditions(p)) return why;
    return p.out_dtype != p.dtype ? "returns out in q's dtype (out_dtype)" : nullptr;
}

// What a kernel is handed of the device's memory.
struct KernelMemory {
    std::byte* sums = nullptr;  // for all regions of a call
    std::byte* workspace = nullptr;
};

// Problem: AttentionProblem (forward) or BackwardProblem. A call is one region of it or several, one after
// another. `device` has the addresses of the device in the indices of the whole problem; `host` is the same
// problem with what the host can read of lengths and offsets.
template <class Problem>
class DeviceKernel {
public:
    virtual ~DeviceKernel() = default;

    // Grows with the region: what suffices for one suffices for every smaller one.
    virtual std::size_t workspace_bytes(const Problem& host, const Problem& device,
                                        const Chunk& region) const = 0;
    virtual void queue(const Problem& host, const Problem& device, const Chunk& region,
                       const KernelMemory& memory, Stream stream) const = 0;
    // What is summed over the regions: cleared before the first, written to the results after the last.
    virtual std::size_t sums_bytes(const Problem&) const { return 0; }
    virtual void queue_start(const Problem& /*device*/, std::byte* /*sums*/, Stream) const {}
    virtual void queue_finish(const Problem& /*device*/, std::byte* /*sums*/, Stream) const {}

    virtual std::string describe(const Problem& p, bool staged) const = 0;
};

}  // namespace fastattn::cuda
