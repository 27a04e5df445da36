// Online softmax over a tile of scores (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
// FlashAttention, arXiv:2205.14135), in powers of two:
//
//   x = score * log2(e),   p = 2^(x - m),   l += p,   O += p . v
//
// m follows the row's maximum lazily: only when x - m exceeds kSlack is m raised (to an integer, so that
// the correction is an exact power of two) and what was summed so far scaled down. m = -inf: nothing seen.
// x is rounded before m is taken off (no fused multiply-add): equal scores have equal weights, whatever
// their size.
#pragma once

#include <cmath>
#include <limits>

#include "core/philox.h"
#include "core/scalar_access.h"
#include "cpu/flash_engine.h"
#include "cpu/flash_workspace.h"

namespace fastattn::cpu {
namespace {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr int kSlack = 8;

template <class T>
inline constexpr T kInf = std::numeric_limits<T>::infinity();

// Finite scores stay finite in powers of two: those beyond +-score_limit count as that. So a bias of the
// dtype's lowest number, which some use as a mask, leaves a row that has nothing else the mean of its values.
template <class T>
inline constexpr T score_limit = std::numeric_limits<T>::max() / T(1.5);

// A finite double as the nearest finite T.
template <class T>
T to_finite(double x) {
    constexpr double top = double(std::numeric_limits<T>::max());
    return static_cast<T>(x > top ? top : (x < -top ? -top : x));
}

inline double read_head(const HeadOperand& x, std::int64_t b, std::int64_t h) {
    return load_real(x.data, x.dtype, b * x.batch + h * x.head);
}

// n values of a bias row, in the compute type.
template <class V>
FASTATTN_INLINE V load_bias(const ScoreOperand& bias, std::int64_t at, std::int64_t n) {
    if constexpr (sizeof(typename V::value_type) == 8) {
        return load_strided<V>(static_cast<const double*>(bias.data) + at, bias.key, n);
    } else {
        switch (bias.dtype) {
            case DType::f16: return load_strided<V>(static_cast<const f16_t*>(bias.data) + at, bias.key, n);
            case DType::bf16: return load_strided<V>(static_cast<const bf16_t*>(bias.data) + at, bias.key, n);
            default: return load_strided<V>(static_cast<const float*>(bias.data) + at, bias.key, n);
        }
    }
}

// Which of n keys from a mask's element `at` on may be attended.
template <class V>
FASTATTN_INLINE typename V::Mask load_mask(const ScoreOperand& mask, std::int64_t at, std::int64_t n) {
    const auto* p = static_cast<const std::uint8_t*>(mask.data) + at;
    if (mask.key == 1 && n >= V::width) return V::mask_bytes(p);
    alignas(64) std::uint8_t buffer[64] = {};
    for (std::int64_t i = 0; i < n && i < V::width; ++i) buffer[i] = p[i * mask.key];
    return V::mask_bytes(buffer);
}

inline std::int64_t score_offset(const ScoreOperand& x, std::int64_t b, std::int64_t h, std::int64_t i,
                                 std::int64_t j) {
    return b * x.batch + h * x.head + i * x.query + j * x.key;
}

// Whether any of n mask bytes from (b, h, i, j) on is set.
inline bool mask_any(const ScoreOperand& mask, std::int64_t b, const RowInfo& row, std::int64_t j,
                     std::int64_t n) {
    const auto* p =
        static_cast<const std::uint8_t*>(mask.data) + score_offset(mask, b, row.head, row.query, j);
    if (mask.key == 0) return n > 0 && *p != 0;
    std::int64_t k = 0;
    if (mask.key == 1) {
        for (; k + 8 <= n; k += 8) {
            std::uint64_t word;
            std::memcpy(&word, p + k, 8);
            if (word != 0) return true;
        }
    }
    for (; k < n; ++k) {
        if (p[k * mask.key] != 0) return true;
    }
    return false;
}

// Everything that an item of work shares. Rows beyond `rows` in the last tile repeat the last row.
template <class E>
struct FlashBlock {
    using Acc = typename E::Acc;
    const AttentionProblem& problem;
    std::int64_t batch;      // b
    Acc scale, scale_log2e, softcap, inverse_softcap;
    bool alibi, bias, mask;
    bool elementwise;        // softcap, alibi, bias or mask: not just scale and ranges
    std::int64_t o_stride;
    RowInfo* info;           // (rows)
    Acc* row_max;            // m (rows)
    Acc* row_sum;            // l (rows, sums, width), summed at the end
    Acc* o;                  // (rows, o_stride)
};

template <class E>
FlashBlock<E> make_block(const AttentionProblem& p, std::int64_t b) {
    using Acc = typename E::Acc;
    // Beyond these a cap is nothing, or all; its reciprocal stays a number.
    const double cap = p.softcap > 1e30 ? 0.0 : (p.softcap > 0 && p.softcap < 1e-30 ? 1e-30 : p.softcap);
    return {p,
            b,
            to_finite<Acc>(p.scale),
            to_finite<Acc>(p.scale * kLog2E),
            Acc(cap),
            Acc(cap > 0 ? 1.0 / cap : 0.0),
            p.alibi_slopes.data != nullptr,
            p.bias.data != nullptr,
            p.mask.data != nullptr,
            cap > 0 || p.alibi_slopes.data != nullptr || p.bias.data != nullptr || p.mask.data != nullptr,
            0,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
}

// Whether row may attend key j: all restrictions.
template <class E>
bool attends(const FlashBlock<E>& x, const RowInfo& row, std::int64_t j) {
    if (j < row.begin || j >= row.end) return false;
    const ScoreOperand &mask = x.problem.mask, &bias = x.problem.bias;
    if (mask.data != nullptr && !mask_any(mask, x.batch, row, j, 1)) return false;
    return bias.data == nullptr ||
           load_real(bias.data, bias.dtype, score_offset(bias, x.batch, row.head, row.query, j)) !=
               -kInf<double>;
}

template <class E>
bool attends_any(const FlashBlock<E>& x, const RowInfo& row) {
    const ScoreOperand &mask = x.problem.mask, &bias = x.problem.bias;
    if (row.begin >= row.end) return false;
    if (mask.data != nullptr && !mask_any(mask, x.batch, row, row.begin, row.end - row.begin)) return false;
    if (bias.data == nullptr) return true;
    for (std::int64_t j = row.begin; j < row.end; ++j) {
        if (attends(x, row, j)) return true;
    }
    return false;
}

// What the arguments of the scores hold for one row.
template <class E>
void find_features(const FlashBlock<E>& x, RowInfo& row) {
    const AttentionProblem& p = x.problem;
    row.bias = p.bias.data == nullptr ? 0 : score_offset(p.bias, x.batch, row.head, row.query, 0);
    row.mask = p.mask.data == nullptr ? 0 : score_offset(p.mask, x.batch, row.head, row.query, 0);
    row.slope = p.alibi_slopes.data == nullptr ? 0.0 : -read_head(p.alibi_slopes, x.batch, row.head);
    row.position = double(row.query) + double(p.offset(x.batch));  // any q_offset, no overflow
}

// -inf for the keys j0, j0+1, ... that are outside of the row's range.
template <class V, int N>
FASTATTN_INLINE void keep_range(const RowInfo& row, std::int64_t j0, V (&x)[N]) {
    using Acc = typename V::value_type;
    const V begin = V::set1(Acc(row.begin - j0)), end = V::set1(Acc(row.end - j0));
    const V masked = V::set1(-kInf<Acc>);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        const V key = V::iota() + V::set1(Acc(n * V::width));
        x[n] = V::select(V::gt(end, key), V::select(V::gt(begin, key), masked, x[n]), masked);
    }
}

// One vector of raw products q.k with keys j, j+1, ... becomes x, by all arguments but the key ranges.
template <class E>
FASTATTN_INLINE typename E::V transform(const FlashBlock<E>& x, const RowInfo& row, typename E::V t,
                                        std::int64_t j) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const AttentionProblem& p = x.problem;
    const V masked = V::set1(-kInf<Acc>);
    t = t * V::set1(x.scale);
    if (x.softcap > 0) t = V::set1(x.softcap) * tanh(t * V::set1(x.inverse_softcap));
    if (x.alibi) {
        const V distance = V::set1(Acc(row.position - double(j))) - V::iota();
        t = V::fma(V::set1(to_finite<Acc>(row.slope)), V::max(distance, V::zero() - distance), t);
    }
    typename V::Mask barred{};
    if (x.bias) {
        const V add = load_bias<V>(p.bias, row.bias + j * p.bias.key, p.kv_size - j);
        barred = V::eq(add, masked);
        t = t + add;
    }
    if (x.alibi || x.bias) {
        const V limit = V::set1(score_limit<Acc>);
        const V near = V::max(V::zero() - limit, V::min(limit, t));
        const V size = V::max(t, V::zero() - t);
        t = V::select(V::eq(size, V::set1(kInf<Acc>)), t, near);
    }
    t = t * V::set1(Acc(kLog2E));
    if (x.bias) t = V::select(barred, masked, t);
    if (x.mask) t = V::select(load_mask<V>(p.mask, row.mask + j * p.mask.key, p.kv_size - j), t, masked);
    return t;
}

// s: raw products of one row with keys j0, j0+1, ...; becomes x, with -inf where masked. Returns the largest,
// by lane.
template <class E>
typename E::V transform_row(const FlashBlock<E>& x, const RowInfo& row, typename E::Acc* s, std::int64_t j0,
                            int vectors) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const bool ranged = row.begin > j0 || row.end < j0 + vectors * w;
    V top = V::set1(-kInf<Acc>);
    for (int c = 0; c < vectors; ++c) {
        V t[1] = {V::load(s + c * w)};
        t[0] = x.elementwise ? transform(x, row, t[0], j0 + c * w) : t[0] * V::set1(x.scale_log2e);
        if (ranged) keep_range(row, j0 + c * w, t);
        t[0].store(s + c * w);
        top = V::max(t[0], top);
    }
    return top;
}

// Zeroes dropped weights of n keys from j on, both multiples of 4 (scaling by 1/(1-p) waits for the end).
template <class E>
void drop_weights(const FlashBlock<E>& x, const RowInfo& row, typename E::Acc* p, std::int64_t j, int n) {
    constexpr int lanes = 16;  // blocks of 4 keys at once
    const std::uint32_t threshold = dropout_threshold(x.problem.dropout);
    for (int i = 0; i < n; i += 4 * lanes) {
        std::uint32_t words[4][lanes];
        philox4x32<lanes>(static_cast<std::uint32_t>((j + i) / 4), static_cast<std::uint32_t>(row.query),
                          static_cast<std::uint32_t>(row.head), static_cast<std::uint32_t>(x.batch),
                          x.problem.seed, words);
        const int left = n - i < 4 * lanes ? n - i : 4 * lanes;
        for (int k = 0; k < left; ++k) {
            if (words[k % 4][k / 4] < threshold) p[i + k] = 0;
        }
    }
}

// Raises m of row r by delta: scales what the row has summed, and its weights in columns
// [first, column) that wait for their product with v.
template <class E>
void rescale_row(const FlashBlock<E>& x, std::int64_t r, typename E::Acc delta, typename E::Unit* p,
                 std::int64_t first, std::int64_t column) {
    using V = typename E::V;
    const V alpha = V::scale2(V::set1(1), V::set1(-delta));
    const auto factor = V::first(alpha);
    for (std::int64_t c = first; c < column; ++c) E::set_weight(p, c, E::weight(p, c) * factor);
    auto* o = x.o + r * x.o_stride;
    for (std::int64_t c = 0; c < x.o_stride; c += V::width) (V::load(o + c) * alpha).store(o + c);
    for (int s = 0; s < E::sums; ++s) {
        auto* l = x.row_sum + (r * E::sums + s) * V::width;
        (V::load(l) * alpha).store(l);
    }
}

// l of row r: as computed (for lse), or as rounded for the product with v (for out).
template <class E>
double total_weight(const FlashBlock<E>& x, std::int64_t r, bool rounded) {
    using V = typename E::V;
    const int s = rounded ? E::sums - 1 : 0;
    return double(V::reduce_add(V::load(x.row_sum + (r * E::sums + s) * V::width)));
}

// Raises m of row r when its largest x, peak, asks for it.
template <class E>
void follow_peak(const FlashBlock<E>& x, std::int64_t r, typename E::Acc peak, typename E::Unit* p,
                 std::int64_t first, std::int64_t column) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const Acc old = x.row_max[r];
    const bool fresh = old == -kInf<Acc>;
    if (!(fresh ? peak > old : peak - old > Acc(kSlack))) return;
    const Acc raised = V::first(V::round(V::set1(peak)));
    x.row_max[r] = raised;
    if (!fresh) rescale_row(x, r, raised - old, p, first, column);
}

// What is taken off x: m, or nothing as long as the row has seen nothing.
template <class E>
typename E::V row_shift(const FlashBlock<E>& x, std::int64_t r) {
    using Acc = typename E::Acc;
    return E::V::set1(x.row_max[r] == -kInf<Acc> ? Acc(0) : x.row_max[r]);
}

}  // namespace
}  // namespace fastattn::cpu
