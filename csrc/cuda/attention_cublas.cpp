#include "cuda/attention_cublas.h"

#include <algorithm>

#include "cuda/errors.h"
#include "cuda/launch.h"
#include "cuda/operands.h"

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

// ---- the matrices of a chunk --------------------------------------------------------------------------
// Batch axes: batch entry, kv head, query head of the group (when it is not folded into the rows).
void set_batch(Gemm& gemm, const AttentionProblem& p, const Chunk& c, Fold fold) noexcept {
    gemm.count = {c.batches, c.kv_heads, fold == Fold::none ? p.group : 1};
}

// Rows of one matrix of q, out or the scores.
Index matrix_rows(const AttentionProblem& p, const Chunk& c, Fold fold) noexcept {
    return fold == Fold::none ? c.rows : c.rows * p.group;
}

// q or out: columns of `dims` elements, one for each row.
GemmOperand query_matrix(const AttentionProblem& p, const Chunk& c, Fold fold, const Operand& x,
                         Index dims) noexcept {
    GemmOperand matrix;
    matrix.data = element(x, p.dtype, c.batch, c.row, c.kv_head * p.group);
    matrix.type = type_of(p.dtype);
    matrix.ld = std::max(fold == Fold::inner ? x.head : x.seq, dims);  // of a single row it says nothing
    matrix.stride = {x.batch, x.head * p.group, x.head};
    return matrix;
}

// k or v: columns of `dims` elements, one for each key.
GemmOperand key_matrix(const AttentionProblem& p, const Chunk& c, const Operand& x, Index dims) noexcept {
    GemmOperand matrix;
    matrix.data = element(x, p.dtype, c.batch, c.key, c.kv_head);
    matrix.type = type_of(p.dtype);
    matrix.ld = std::max(x.seq, dims);
    matrix.stride = {x.batch, x.head, 0};
    return matrix;
}

// The scores, as f32 or f64, or what is written over them.
GemmOperand score_matrix(const AttentionProblem& p, const Chunk& c, void* scores, Index ld,
                         cublas::DataType type) noexcept {
    const Index head = c.rows * ld, pair = head * p.group;
    return {scores, type, ld, {pair * c.kv_heads, pair, head}};
}

}  // namespace

Gemm scores_product(const AttentionProblem& p, const Chunk& c, Fold fold, void* scores, Index ld, bool tf32) {
    Gemm gemm;
    gemm.transpose_a = true;  // S^T (keys, rows) = k q^T, column-major
    gemm.compute = compute_of(p.dtype, tf32);
    gemm.m = c.keys;
    gemm.n = matrix_rows(p, c, fold);
    gemm.k = p.head_dim;
    set_batch(gemm, p, c, fold);
    gemm.a = key_matrix(p, c, p.k, p.head_dim);
    gemm.b = query_matrix(p, c, fold, p.q, p.head_dim);
    gemm.c = score_matrix(p, c, scores, ld, p.dtype == DType::f64 ? cublas::kF64 : cublas::kF32);
    return gemm;
}

Gemm values_product(const AttentionProblem& p, const Chunk& c, Fold fold, void* scores, Index ld, bool tf32) {
    Gemm gemm;  // out^T (Dv, rows) = v^T P^T, column-major
    gemm.compute = compute_of(p.dtype, tf32);
    gemm.factor = weight_unit(p.dtype, p.dropout);
    gemm.m = p.value_dim;
    gemm.n = matrix_rows(p, c, fold);
    gemm.k = c.keys;
    set_batch(gemm, p, c, fold);
    gemm.a = key_matrix(p, c, p.v, p.value_dim);
    // A row of weights begins where its scores did, so in elements of the smaller type it is longer.
    const Index weight_ld = ld * static_cast<Index>(score_size(p.dtype) / item_size(p.dtype));
    gemm.b = score_matrix(p, c, scores, weight_ld, type_of(p.dtype));
    gemm.c = query_matrix(p, c, fold, p.out, p.value_dim);
    return gemm;
}

namespace {

// Scratch of a region, within one block of the device.
struct Scratch {
    std::byte *scores = nullptr, *gemm = nullptr, *pointers = nullptr;
};

// A chunk's scores stay within the limit, or are those of one row of one kv head, or of all there is.
Scratch take_scratch(const AttentionProblem& p, const Chunk& region, std::size_t limit,
                     Carver& carver) noexcept {
    Chunk row = region;
    row.batches = row.kv_heads = row.rows = 1;
    Scratch scratch;
    scratch.scores = carver.take(std::min(score_bytes(p, region), std::max(limit, score_bytes(p, row))));
    scratch.gemm = carver.take(kGemmWorkspaceBytes);
    scratch.pointers =
        carver.take(3 * sizeof(void*) * static_cast<std::size_t>(region.batches * region.kv_heads * p.group));
    return scratch;
}

}  // namespace

std::size_t CublasAttention::workspace_bytes(const AttentionProblem& host, const AttentionProblem& device,
                                             const Chunk& region) const {
    Carver carver(nullptr);
    take_scratch(host, region, limit(), carver);
    const RegionOperands operands(host, device, region, carver);
    return carver.used();
}

void CublasAttention::queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                            std::byte* workspace, Stream stream) const {
    Carver carver(workspace);
    const Scratch scratch = take_scratch(host, region, limit(), carver);
    const RegionOperands operands(host, device, region, carver);
    const AttentionProblem& p = operands.problem();
    operands.queue_copies_in(stream);
    const GemmPlans::Place place{stream, scratch.gemm, reinterpret_cast<void**>(scratch.pointers)};
    Chunks walk(host, region, limit());
    for (Chunk chunk; walk.next(chunk);) {
        const Fold fold = fold_of(p, p.q, p.out, chunk);
        SoftmaxArgs args;
        args.problem = p;
        args.chunk = chunk;
        args.group_inner = fold == Fold::inner;
        args.scores = scratch.scores;
        args.ld = score_stride(chunk.keys);
        if (chunk.keys > 0)
            context_.gemm->run(scores_product(p, chunk, fold, scratch.scores, args.ld, tf32_), place);
        launch_softmax(args, stream);
        throw_on_error(runtime::last_error(), "launching softmax_rows");
        if (chunk.keys > 0)
            context_.gemm->run(values_product(p, chunk, fold, scratch.scores, args.ld, tf32_), place);
        if (chunk.keys == 0 || is_restricted(p)) {
            launch_restore(args, stream);
            throw_on_error(runtime::last_error(), "launching restore_rows");
        }
    }
    operands.queue_copies_out(stream);
}

std::string CublasAttention::describe(const AttentionProblem& p, bool staged) const {
    Index chunks = 0;
    Chunk first;
    const auto walk = [&](const Chunk& region) {
        Chunks all(p, region, limit());
        for (Chunk chunk; all.next(chunk); ++chunks)
            if (chunks == 0) first = chunk;
    };
    Units units(p);
    bool same_keys = false;
    if (!staged) walk(whole(p));
    for (Chunk unit; staged && units.next(unit, same_keys);) walk(unit);
    std::string text = "cuBLAS, scores in " + std::to_string(chunks) + " chunk" + (chunks == 1 ? "" : "s") +
                       ", the first of " + std::to_string(first.rows) + " rows x " +
                       std::to_string(first.batches * first.kv_heads * p.group) + " heads";
    if (tf32_ && p.dtype == DType::f32) text += ", TF32";
    return text;
}

}  // namespace fastattn::cuda
