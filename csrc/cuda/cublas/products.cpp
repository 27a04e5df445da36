#include "cuda/cublas/products.h"

#include <algorithm>

#include "cuda/host/operands.h"
#include "cuda/simt/arguments.h"

namespace fastattn::cuda {
namespace {

cublas::DataType type_of(DType dtype) noexcept {
    switch (dtype) {
        case DType::f64: return cublas::kF64;
        case DType::f16: return cublas::kF16;
        case DType::bf16: return cublas::kBf16;
        default: return cublas::kF32;
    }
}

cublas::ComputeType compute_of(DType dtype, bool tf32) noexcept {
    if (dtype == DType::f64) return cublas::kCompute64F;
    return dtype == DType::f32 && tf32 ? cublas::kCompute32FFastTf32 : cublas::kCompute32F;
}

// Batch axes: batch entry, kv head, query head of the group (when it is not folded into the rows).
Gemm product(const AttentionProblem& p, const Chunk& c, Fold fold, bool tf32) noexcept {
    Gemm gemm;
    gemm.compute = compute_of(p.dtype, tf32);
    gemm.count = {c.batches, c.kv_heads, fold == Fold::none ? p.group : 1};
    return gemm;
}

// Rows of one matrix of queries or scores.
Index matrix_rows(const AttentionProblem& p, const Chunk& c, Fold fold) noexcept {
    return fold == Fold::none ? c.rows : c.rows * p.group;
}

// Columns of `dims` elements, one for each row.
GemmOperand query_matrix(const AttentionProblem& p, const Chunk& c, Fold fold, const Operand& x, DType dtype,
                         Index dims) noexcept {
    GemmOperand matrix;
    matrix.data = element(x, dtype, c.batch, c.row, c.kv_head * p.group);
    matrix.type = type_of(dtype);
    matrix.ld = std::max(fold == Fold::inner ? x.head : x.seq, dims);  // of a single row it says nothing
    matrix.stride = {x.batch, x.head * p.group, x.head};
    return matrix;
}

// Columns of `dims` elements, one for each key.
GemmOperand key_matrix(const Chunk& c, const Operand& x, DType dtype, Index dims) noexcept {
    GemmOperand matrix;
    matrix.data = element(x, dtype, c.batch, c.key, c.kv_head);
    matrix.type = type_of(dtype);
    matrix.ld = std::max(x.seq, dims);
    matrix.stride = {x.batch, x.head, 0};
    return matrix;
}

// The scores, or with `dtype` what is written over them.
GemmOperand score_matrix(const AttentionProblem& p, const Chunk& c, const ScoreMatrix& x,
                         DType dtype) noexcept {
    // In elements of a smaller type a row is longer.
    const Index ld = x.ld * static_cast<Index>(score_size(p.dtype) / item_size(dtype));
    const Index head = c.rows * ld, pair = head * p.group;
    return {x.data, type_of(dtype), ld, {pair * c.kv_heads, pair, head}};
}

DType score_dtype(const AttentionProblem& p) noexcept {
    return p.dtype == DType::f64 ? DType::f64 : DType::f32;
}

}  // namespace

Gemm scores_from(const AttentionProblem& p, const Chunk& c, Fold fold, const Operand& queries,
                 const Operand& keys, Index dims, const ScoreMatrix& scores, bool tf32) {
    Gemm gemm = product(p, c, fold, tf32);  // S^T (keys, rows), column-major
    gemm.transpose_a = true;
    gemm.m = c.keys;
    gemm.n = matrix_rows(p, c, fold);
    gemm.k = dims;
    gemm.a = key_matrix(c, keys, p.dtype, dims);
    gemm.b = query_matrix(p, c, fold, queries, p.dtype, dims);
    gemm.c = score_matrix(p, c, scores, score_dtype(p));
    return gemm;
}

Gemm rows_from(const AttentionProblem& p, const Chunk& c, Fold fold, const ScoreMatrix& weights,
               const Operand& keys, Index dims, double factor, const Operand& out, DType out_dtype,
               bool tf32) {
    Gemm gemm = product(p, c, fold, tf32);  // out^T (dims, rows) = keys^T W^T, column-major
    gemm.factor = factor;
    gemm.m = dims;
    gemm.n = matrix_rows(p, c, fold);
    gemm.k = c.keys;
    gemm.a = key_matrix(c, keys, p.dtype, dims);
    gemm.b = score_matrix(p, c, weights, p.dtype);
    gemm.c = query_matrix(p, c, fold, out, out_dtype, dims);
    return gemm;
}

Gemm keys_from(const AttentionProblem& p, const Chunk& c, Fold fold, Index member, const ScoreMatrix& weights,
               const Operand& queries, Index dims, double factor, const Operand& out, bool tf32) {
    Gemm gemm = product(p, c, fold, tf32);  // out^T (dims, keys) = queries^T W, column-major
    gemm.transpose_b = gemm.accumulate = true;
    gemm.factor = factor;
    gemm.m = dims;
    gemm.n = c.keys;
    gemm.k = matrix_rows(p, c, fold);
    gemm.count[2] = 1;
    gemm.a = query_matrix(p, c, fold, queries, p.dtype, dims);
    gemm.b = score_matrix(p, c, weights, p.dtype);
    gemm.c = key_matrix(c, out, score_dtype(p), dims);
    for (GemmOperand* x : {&gemm.a, &gemm.b})
        x->data =
            static_cast<char*>(x->data) + member * x->stride[2] * static_cast<Index>(item_size(p.dtype));
    return gemm;
}

Gemm scores_product(const AttentionProblem& p, const Chunk& c, Fold fold, void* scores, Index ld, bool tf32) {
    return scores_from(p, c, fold, p.q, p.k, p.head_dim, {scores, ld}, tf32);
}

Gemm values_product(const AttentionProblem& p, const Chunk& c, Fold fold, void* scores, Index ld, bool tf32) {
    return rows_from(p, c, fold, {scores, ld}, p.v, p.value_dim, weight_unit(p.dtype, p.dropout), p.out,
                     p.dtype, tf32);
}

}  // namespace fastattn::cuda
