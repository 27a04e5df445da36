// What the SIMT kernels are handed, by value. Every pointer is one of the device.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/host_device.h"
#include "core/score_math.h"
#include "cuda/simt/chunk.h"

namespace fastattn::cuda {

// 16-bit weights of long rows are small numbers, which float16 has few bits for: they are stored times this,
// and the product with v takes it back, together with 1 - dropout.
FASTATTN_HOST_DEVICE constexpr double weight_scale(DType dtype) noexcept {
    return dtype == DType::f16 ? 32768.0 : 1.0;
}
FASTATTN_HOST_DEVICE constexpr double weight_unit(DType dtype, double dropout) noexcept {
    return 1.0 / (weight_scale(dtype) * (1.0 - dropout));
}

// Scale, lengths, causal and window only, and no weights asked for.
inline bool is_plain(const AttentionProblem& p) {
    return !is_elementwise(p) && p.dropout == 0.0 && p.weights.data == nullptr;
}

// The same, and a scale that grows with the products: the fused kernels take maxima before they scale.
inline bool is_plain_flash(const AttentionProblem& p) {
    return is_plain(p) && static_cast<float>(p.scale * 1.44) > 0.0f;
}

// Scores of one chunk: row r of the matrix belongs to pair r / (G * rows) of (batch entry, kv head), the
// batch entry outside; within a pair r = g * rows + i, or i * G + g with group_inner.
struct SoftmaxArgs {
    AttentionProblem problem;
    Chunk chunk;
    bool group_inner = false;
    // in:  raw products q.k, (row, key - chunk.key), in f64 for f64, else f32
    // out: weights in the problem's dtype, in the same memory: row r still starts at r * ld * sizeof(score)
    void* scores = nullptr;
    std::int64_t ld = 0;  // elements of a row of scores, a multiple of 8
};

// target[b,s,h,d] = source[b,s,h,d]; with lengths, rows s >= lengths[b] - first_row become 0 without being
// read.
struct CopyArgs {
    Operand source, target;
    int item_size = 0;  // bytes: 2, 4 or 8
    std::int64_t batches = 0, rows = 0, heads = 0, dims = 0;
    bool has_lengths = false;
    HeadOperand lengths;  // batch stride counts from entry 0 of the copy
    std::int64_t first_row = 0;
};

// Addresses for products in pointer-array mode: pointers[x * n + e] = base[x] + the strides of entry e, where
// e counts through count[0] x count[1] x count[2], the last fastest, n of them.
struct PointerArgs {
    void** pointers = nullptr;
    char* base[3] = {};
    std::int64_t stride[3][3] = {};  // [x][axis], bytes
    std::int64_t count[3] = {1, 1, 1};
};

// ---- the backward pass ------------------------------------------------------------------------------------
// What the pairs of a row share.
template <class Acc>
struct RowState {
    Acc shift, factor;  // P = 2^(x - shift) * factor, x = score * log2 e
    Acc delta;  // dout . out - dlse
    Acc sink;  // weight of the sink
    Acc unit;  // what dS is stored in units of; for a while the largest of the row
};

// One chunk of a region. Arrays over the rows of the region are [batches][query heads][rows], over its keys
// [batches][kv heads][keys].
struct BackwardArgs {
    BackwardProblem problem;
    Chunk region, chunk;
    bool group_inner = false;  // of the chunk's scores, as in SoftmaxArgs
    // in:  raw products q.k and dout.v, as SoftmaxArgs::scores
    // out: r P * weight_scale, and the gradient by scale * q.k, in the problem's dtype; this one, in float16,
    // still in the
    //      accumulator's type
    void *scores = nullptr, *gradients = nullptr;
    void* bias_gradients =
        nullptr;  // dS in the accumulator's type, rows as those of scores; null: not wanted
    std::int64_t ld = 0;
    void* states = nullptr;  // RowState of the region's rows
    void* slopes = nullptr;  // of the region's rows: sum_j dS |p - j|; null: not wanted
    void* units = nullptr;  // of each (batch entry, kv head) of the region: what dS is stored in units of
    // Sums of the region in the accumulator's type.
    Operand dq, dk, dv;
    Operand dk_part;  // of the chunk alone, in `units`
    // Rows of k, q and dout that hold NaN or Inf, and for each head of a batch entry whether it has some.
    const std::uint8_t *bad_k = nullptr, *bad_q = nullptr, *bad_dout = nullptr;
    const std::uint8_t *any_bad_k = nullptr, *any_bad_q = nullptr, *any_bad_dout = nullptr;
    // Where dS is summed: an array of the accumulator's type, stride 0 along what is summed over; or, with
    // bias_whole, dbias, of which every element is one dS.
    ScoreOperand bias_sums;
    bool bias_whole = false;
    // Sums over the units of a call: (B or 1, Hq) and (Hq,).
    double *slope_sums = nullptr, *sink_sums = nullptr;
};

// A copy whose NaN and Inf are 0. bad: 1 for every row (b, h, s) that has some, else 0.
struct CleanArgs {
    CopyArgs copy;
    DType dtype = DType::f32;
    std::uint8_t* bad = nullptr;
};

// any[n] = whether bad[n * size .. (n + 1) * size) has a 1.
struct AnyArgs {
    const std::uint8_t* bad = nullptr;
    std::uint8_t* any = nullptr;
    std::int64_t count = 0, size = 0;
};

// target = factor * unit * source, where source is a sum in the accumulator's type; rows outside of [begin,
// end) are 0.
struct StoreArgs {
    Operand source, target;
    DType dtype = DType::f32;  // of target
    std::int64_t batches = 0, rows = 0, heads = 0, dims = 0;
    double factor = 1.0;
    std::int64_t begin = 0, end = 0;
    const void* states = nullptr;  // RowState of [batches][heads][rows], for the unit; null: 1
};

// dbias[b,h,i,j] of a box = sums, or 0 where there are none. Sizes of what is broadcast are 1.
struct StoreBiasArgs {
    ScoreOperand sums, target;
    std::int64_t first[4] = {}, size[4] = {};
};

// dalibi_slopes and dsinks from their sums.
struct StoreHeadsArgs {
    ScoreOperand dalibi, dsinks;
    const double *slope_sums = nullptr, *sink_sums = nullptr;
    std::int64_t batches = 0, heads = 0;  // of dalibi; heads of both
};

// bytes of zeros, a multiple of 16.
struct ZeroArgs {
    void* data = nullptr;
    std::int64_t bytes = 0;
};

}  // namespace fastattn::cuda
