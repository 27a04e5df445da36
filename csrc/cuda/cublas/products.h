// The products of a chunk, forward and backward: pure functions. Scores start at `data` with rows `ld` scores
// apart; weights in the problem's dtype lie over them, so that a row begins where its scores did. Keys are
// read from the chunk's first on.
#pragma once

#include "cuda/blas/gemm.h"
#include "cuda/host/chunking.h"

namespace fastattn::cuda {

struct ScoreMatrix {
    void* data = nullptr;
    std::int64_t ld = 0;
};

// scores (rows, keys) = queries keys^T, in f64 for f64, else f32. Queries: q or dout; keys: k or v; both of
// `dims` features.
Gemm scores_from(const AttentionProblem& p, const Chunk& chunk, Fold fold, const Operand& queries,
                 const Operand& keys, Index dims, const ScoreMatrix& scores, bool tf32);
// out (rows, dims) = factor * weights keys, in `out_dtype`.
Gemm rows_from(const AttentionProblem& p, const Chunk& chunk, Fold fold, const ScoreMatrix& weights,
               const Operand& keys, Index dims, double factor, const Operand& out, DType out_dtype,
               bool tf32);
// out (keys, dims) += factor * weights^T queries, in the accumulator's type. With Fold::none of query head
// `member` of each group, else of all.
Gemm keys_from(const AttentionProblem& p, const Chunk& chunk, Fold fold, Index member,
               const ScoreMatrix& weights, const Operand& queries, Index dims, double factor,
               const Operand& out, bool tf32);

// The forward's: S = q k^T, out = P v.
Gemm scores_product(const AttentionProblem& p, const Chunk& chunk, Fold fold, void* scores, std::int64_t ld,
                    bool tf32);
Gemm values_product(const AttentionProblem& p, const Chunk& chunk, Fold fold, void* scores, std::int64_t ld,
                    bool tf32);

}  // namespace fastattn::cuda
