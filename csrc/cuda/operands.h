// The operands of a region as a kernel can read them: 16-byte steps, neighbours in the last axis. Where the caller's arrays are not
// like that they are copied, the result too.
#pragma once

#include "cuda/chunking.h"
#include "cuda/context.h"

namespace fastattn::cuda {

class RegionOperands {
public:
    // Takes memory for the copies from `carver` (of a null block: only sizes). `host` as for attend().
    RegionOperands(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                   Carver& carver) noexcept;

    // The device's problem with the copies in place of what they stand for.
    const AttentionProblem& problem() const noexcept { return prepared_; }
    void queue_copies_in(Stream stream) const;
    void queue_copies_out(Stream stream) const;

private:
    void copy_queries(const Operand& source, const Operand& target, Index dims, Stream stream) const;
    void copy_keys(const Operand& source, const Operand& target, Index dims, bool only_valid,
                   Stream stream) const;

    const AttentionProblem& device_;
    AttentionProblem prepared_;
    Chunk region_;
    bool q_, k_, v_, out_;  // copied
};

// The address of an element.
void* element(const Operand& x, DType dtype, Index b, Index s, Index h) noexcept;

}  // namespace fastattn::cuda
