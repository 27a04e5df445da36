#include "core/flops.h"

#include <algorithm>
#include <initializer_list>

#include "core/mask_lists.h"

namespace fastattn {
namespace {

using Index = std::int64_t;

// sum of clamp(i + shift, 0, limit) over rows i in [0, rows): 0, then an arithmetic series, then limit.
// In double, since the sums pass 2^63; sizes and shifts below 2^53 are exact.
double sum_of_clamped(double shift, double limit, double rows) noexcept {
    const double rise = std::clamp(-shift, 0.0, rows);
    const double flat = std::clamp(limit - shift, rise, rows);
    return (flat - rise) * (rise + flat - 1.0 + 2.0 * shift) / 2.0 + (rows - flat) * limit;
}

// Pairs (row, key) of one head of batch entry b: the sum of key_range(b, i) over its rows.
double count_pairs(const AttentionProblem& p, Index b) noexcept {
    const auto rows = static_cast<double>(p.q_len(b)), keys = static_cast<double>(p.kv_len(b));
    const auto offset = static_cast<double>(p.offset(b));
    double pairs = rows * keys;
    if (p.causal || p.window_right >= 0) {
        const double right = p.causal ? 0.0 : static_cast<double>(p.window_right);
        pairs = sum_of_clamped(offset + right + 1.0, keys, rows);
    }
    if (p.window_left >= 0) {
        // Both ends are clamped to [0, keys] and begin <= end, so the sums may be taken apart.
        pairs -= sum_of_clamped(offset - static_cast<double>(p.window_left), keys, rows);
    }
    return pairs;
}

double count_elements(std::initializer_list<Index> sizes, std::initializer_list<Index> strides) noexcept {
    double count = 1.0;
    const Index* stride = strides.begin();
    for (const Index size : sizes) {
        if (size == 0) return 0.0;
        if (*stride++ != 0) count *= static_cast<double>(size);
    }
    return count;
}

}  // namespace

double count_flops(const AttentionProblem& p) {
    if (p.condition_count > 0)
        return count_listed_pairs(p) * 2.0 * static_cast<double>(p.head_dim + p.value_dim);
    double pairs = 0.0;
    const bool differ = p.packed() || p.has_q_lens || p.has_kv_lens || p.q_offsets.data != nullptr;
    if (differ) {
        for (Index b = 0; b < p.batch; ++b) pairs += count_pairs(p, b);
    } else if (p.batch > 0) {
        pairs = static_cast<double>(p.batch) * count_pairs(p, 0);
    }
    return pairs * static_cast<double>(p.q_heads) * 2.0 * static_cast<double>(p.head_dim + p.value_dim);
}

double flops_at_most(const AttentionProblem& p) noexcept {
    return 2.0 * static_cast<double>(p.head_dim + p.value_dim) * static_cast<double>(p.array_batch()) *
           static_cast<double>(p.q_heads) * static_cast<double>(p.q_size) *
           static_cast<double>(p.kv_size + 1);
}

namespace {

double score_bytes(const AttentionProblem& p, const ScoreOperand& x, Index keys) noexcept {
    if (x.data == nullptr) return 0.0;
    return static_cast<double>(item_size(x.dtype)) *
           count_elements({p.array_batch(), p.q_heads, p.q_size, keys}, {x.batch, x.head, x.query, x.key});
}

}  // namespace

double count_result_bytes(const AttentionProblem& p) noexcept {
    const double out = static_cast<double>(item_size(p.out_dtype)) * static_cast<double>(p.array_batch()) *
                       static_cast<double>(p.q_size) * static_cast<double>(p.q_heads) *
                       static_cast<double>(p.value_dim);
    return out + score_bytes(p, p.lse, 1) + score_bytes(p, p.weights, p.kv_size);
}

double count_bytes(const AttentionProblem& p) noexcept {
    const auto operand = [&](const Operand& x, DType dtype, Index seq, Index heads, Index dim) {
        const auto item = static_cast<double>(item_size(dtype));
        return item * count_elements({p.array_batch(), seq, heads, dim}, {x.batch, x.seq, x.head, x.dim});
    };
    const auto per_head = [&](const HeadOperand& x, Index heads) {
        if (x.data == nullptr) return 0.0;
        return static_cast<double>(item_size(x.dtype)) * count_elements({p.batch, heads}, {x.batch, x.head});
    };
    // Of keys in pages as many as the entries have.
    const auto key_operand = [&](const Operand& x, DType dtype, Index dim) {
        if (!p.paged()) return operand(x, dtype, p.kv_size, p.kv_heads, dim);
        double keys = 0.0;
        for (Index b = 0; b < p.batch; ++b) keys += static_cast<double>(p.kv_len(b));
        return keys * static_cast<double>(item_size(dtype)) * static_cast<double>(p.kv_heads * dim);
    };
    const auto bounds = [&](const HeadOperand& x) {
        if (x.data == nullptr) return 0.0;
        return static_cast<double>(item_size(x.dtype)) * static_cast<double>(p.batch + 1);
    };
    return operand(p.q, p.dtype, p.q_size, p.q_heads, p.head_dim) + key_operand(p.k, p.k_dtype, p.head_dim) +
           key_operand(p.v, p.v_dtype, p.value_dim) + score_bytes(p, p.mask, p.kv_size) +
           score_bytes(p, p.bias, p.kv_size) + per_head(p.alibi_slopes, p.q_heads) +
           per_head(p.sinks, p.q_heads) + per_head(p.q_lens, 1) + per_head(p.kv_lens, 1) +
           per_head(p.q_offsets, 1) + bounds(p.cu_q) + bounds(p.cu_kv) + count_result_bytes(p);
}

}  // namespace fastattn
