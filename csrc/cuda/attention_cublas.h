// Attention by two products of cuBLAS with a softmax between them, chunk by chunk, on one device and in one stream.
//
//   S (rows, keys) = q k^T        raw products, in f64 for f64, else f32
//   P (rows, keys) = softmax(S)   in the problem's dtype, over S
//   out (rows, Dv) = P v
//
// Scores of a chunk stay in the second-level cache; the Sq x Sk array of a head never exists whole unless it is small.
#pragma once

#include "cuda/chunking.h"
#include "cuda/context.h"

namespace fastattn::cuda {

// Memory for one region, within one block of the device.
struct CublasWorkspace {
    std::size_t limit = 0;  // bytes of scores of a chunk, but for single rows that are longer
    std::byte *scores = nullptr, *gemm = nullptr, *pointers = nullptr;
    std::byte *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr;  // compact copies, where needed
    std::size_t bytes = 0;
};

// Lays the workspace out in `block` (null: only sizes). Grows with the region: what suffices for one suffices for every
// smaller one. Operands as they lie on the device; `host` as for attend().
CublasWorkspace lay_out(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                        const DeviceProperties& properties, std::byte* block);

// Queues the region's attention. `device` has the addresses of the device, in the indices of the whole problem; `host` the
// same problem with what the host can read of lengths and offsets.
void attend(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
            const CublasWorkspace& workspace, const DeviceContext& context, Stream stream, bool tf32);

// The products of a chunk: pure functions. S starts at `scores` with rows `ld` apart; k and v are read from the chunk's
// first key on.
Gemm scores_product(const AttentionProblem& p, const Chunk& chunk, Fold fold, void* scores, std::int64_t ld,
                    bool tf32);
Gemm values_product(const AttentionProblem& p, const Chunk& chunk, Fold fold, void* scores, std::int64_t ld,
                    bool tf32);

}  // namespace fastattn::cuda
