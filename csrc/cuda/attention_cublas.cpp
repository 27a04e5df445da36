#include "cuda/attention_cublas.h"

#include <algorithm>

#include "cuda/errors.h"
#include "cuda/launch.h"

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

void* element(const Operand& x, DType dtype, Index b, Index s, Index h) noexcept {
    const Index at = b * x.batch + s * x.seq + h * x.head;
    return static_cast<char*>(x.data) + at * static_cast<Index>(item_size(dtype));
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

// ---- operands that cuBLAS can use ----------------------------------------------------------------------
// Which operands of the region are copied.
struct Copies {
    bool q, k, v, out;
};

Copies copies_of(const AttentionProblem& host, const AttentionProblem& p, const Chunk& region) noexcept {
    // Values of keys beyond a length that only the device knows may be anything; copied, they are zero.
    const bool hidden_keys = host.has_kv_lens && host.kv_lens.place != DeviceType::cpu;
    return {!is_gemm_operand(p.q, p.dtype, region.rows, p.head_dim),
            !is_gemm_operand(p.k, p.dtype, region.keys, p.head_dim),
            hidden_keys || !is_gemm_operand(p.v, p.dtype, region.keys, p.value_dim),
            !is_gemm_operand(p.out, p.dtype, region.rows, p.value_dim)};
}

Operand compact_query(const AttentionProblem& p, const Chunk& region, void* data, Index dims) noexcept {
    return compact_operand(data, p.dtype, region, region.kv_head * p.group, region.kv_heads * p.group,
                           region.row, region.rows, dims);
}

Operand compact_keys(const AttentionProblem& p, const Chunk& region, void* data, Index dims) noexcept {
    return compact_operand(data, p.dtype, region, region.kv_head, region.kv_heads, region.key, region.keys,
                           dims);
}

void copy(const AttentionProblem& p, const Operand& source, const Operand& target, Index first_batch,
          Index batches, Index first_row, Index rows, Index first_head, Index heads, Index dims,
          bool only_valid_keys, Stream stream) {
    CopyArgs args;
    args.source = source;
    args.target = target;
    args.source.data = element(source, p.dtype, first_batch, first_row, first_head);
    args.target.data = element(target, p.dtype, first_batch, first_row, first_head);
    args.item_size = static_cast<int>(item_size(p.dtype));
    args.batches = batches;
    args.rows = rows;
    args.heads = heads;
    args.dims = dims;
    if (only_valid_keys) {
        args.has_lengths = true;
        args.lengths = p.kv_lens;
        args.lengths.data = static_cast<const char*>(p.kv_lens.data) +
                            first_batch * p.kv_lens.batch * static_cast<Index>(item_size(p.kv_lens.dtype));
    }
    launch_copy(args, stream);
    throw_on_error(runtime::last_error(), "launching copy_rows");
}

// The problem with its compact copies in place.
AttentionProblem with_copies(const AttentionProblem& p, const Chunk& region, const Copies& copies,
                             const CublasWorkspace& w) noexcept {
    AttentionProblem prepared = p;
    if (copies.q) prepared.q = compact_query(p, region, w.q, p.head_dim);
    if (copies.k) prepared.k = compact_keys(p, region, w.k, p.head_dim);
    if (copies.v) prepared.v = compact_keys(p, region, w.v, p.value_dim);
    if (copies.out) prepared.out = compact_query(p, region, w.out, p.value_dim);
    return prepared;
}

}  // namespace

CublasWorkspace lay_out(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
                        const DeviceProperties& properties, std::byte* block) {
    CublasWorkspace w;
    w.limit = score_limit(properties.l2_bytes);
    const Copies copies = copies_of(host, device, region);
    const AttentionProblem& p = host;
    const Index q_heads = region.kv_heads * p.group;
    // A chunk stays within the limit, or is one row of one kv head, or is all there is.
    Chunk all = region, row = region;
    row.batches = row.kv_heads = row.rows = 1;
    const std::size_t scores = std::min(score_bytes(p, all), std::max(w.limit, score_bytes(p, row)));
    Carver carver(block);
    w.scores = carver.take(scores);
    w.gemm = carver.take(kGemmWorkspaceBytes);
    w.pointers = carver.take(3 * sizeof(void*) * static_cast<std::size_t>(region.batches * q_heads));
    const auto bytes = [&](Index heads, Index rows, Index dims) {
        return compact_bytes(p.dtype, region.batches, heads, rows, dims);
    };
    if (copies.q) w.q = carver.take(bytes(q_heads, region.rows, p.head_dim));
    if (copies.k) w.k = carver.take(bytes(region.kv_heads, region.keys, p.head_dim));
    if (copies.v) w.v = carver.take(bytes(region.kv_heads, region.keys, p.value_dim));
    if (copies.out) w.out = carver.take(bytes(q_heads, region.rows, p.value_dim));
    w.bytes = carver.used();
    return w;
}

void attend(const AttentionProblem& host, const AttentionProblem& device, const Chunk& region,
            const CublasWorkspace& w, const DeviceContext& context, Stream stream, bool tf32) {
    const Copies copies = copies_of(host, device, region);
    const AttentionProblem p = with_copies(device, region, copies, w);
    const Index q_head = region.kv_head * p.group, q_heads = region.kv_heads * p.group;
    const auto copy_keys = [&](const Operand& source, const Operand& target, Index dims, bool only_valid) {
        copy(device, source, target, region.batch, region.batches, region.key, region.keys, region.kv_head,
             region.kv_heads, dims, only_valid, stream);
    };
    const auto copy_rows = [&](const Operand& source, const Operand& target, Index dims) {
        copy(device, source, target, region.batch, region.batches, region.row, region.rows, q_head, q_heads,
             dims, false, stream);
    };
    if (region.keys > 0) {
        if (copies.k) copy_keys(device.k, p.k, p.head_dim, false);
        if (copies.v) copy_keys(device.v, p.v, p.value_dim, p.has_kv_lens);
    }
    if (copies.q) copy_rows(device.q, p.q, p.head_dim);

    const GemmPlans::Place place{stream, w.gemm, reinterpret_cast<void**>(w.pointers)};
    Chunks walk(host, region, w.limit);
    for (Chunk chunk; walk.next(chunk);) {
        const Fold fold = fold_of(p, p.q, p.out, chunk);
        SoftmaxArgs args;
        args.problem = p;
        args.chunk = chunk;
        args.group_inner = fold == Fold::inner;
        args.scores = w.scores;
        args.ld = score_stride(chunk.keys);
        if (chunk.keys > 0) context.gemm->run(scores_product(p, chunk, fold, w.scores, args.ld, tf32), place);
        launch_softmax(args, stream);
        throw_on_error(runtime::last_error(), "launching softmax_rows");
        if (chunk.keys > 0) context.gemm->run(values_product(p, chunk, fold, w.scores, args.ld, tf32), place);
        if (chunk.keys == 0 || is_restricted(p)) {
            launch_restore(args, stream);
            throw_on_error(runtime::last_error(), "launching restore_rows");
        }
    }
    if (copies.out) copy_rows(p.out, device.out, p.value_dim);
}

}  // namespace fastattn::cuda
