// The operands of a region as a kernel can read them: 16-byte steps, neighbours in the last axis. Where the
// caller's arrays are not like that they are copied, the result too.
#pragma once

#include "cuda/host/chunking.h"
#include "cuda/host/context.h"
#include "cuda/simt/arguments.h"

namespace fastattn::cuda {

// The address of an element.
void* element(const Operand& x, DType dtype, Index b, Index s, Index h) noexcept;

// ---- the queries (q, dout, ..) or keys (k, v) of a region -------------------------------------------------
// A compact array for them, of `dims` features.
Operand take_queries(const AttentionProblem& p, const Chunk& region, DType dtype, Index dims,
                     Carver& carver) noexcept;
Operand take_keys(const AttentionProblem& p, const Chunk& region, DType dtype, Index dims,
                  Carver& carver) noexcept;
// What copies them, all in the problem's dtype.
CopyArgs copy_of_queries(const AttentionProblem& p, const Chunk& region, const Operand& source,
                         const Operand& target, Index dims) noexcept;
CopyArgs copy_of_keys(const AttentionProblem& p, const Chunk& region, const Operand& source,
                      const Operand& target, Index dims) noexcept;
void queue_copy(const CopyArgs& args, Stream stream);

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
    const AttentionProblem& device_;
    AttentionProblem prepared_;
    Chunk region_;
    bool q_, k_, v_, out_;  // copied
};

}  // namespace fastattn::cuda
