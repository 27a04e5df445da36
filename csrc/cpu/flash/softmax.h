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
#include "core/score_math.h"
#include "cpu/flash/engine.h"
#include "cpu/flash/workspace.h"

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

inline std::int64_t score_offset(const ScoreOperand& x, std::int64_t b, std::int64_t h, std::int64_t i,
                                 std::int64_t j) {
    return b * x.batch + h * x.head + i * x.query + j * x.key;
}

// Everything that an item of work shares. A row beyond an odd number of them repeats the last one.
template <class E>
struct FlashBlock {
    using Acc = typename E::Acc;
    const AttentionProblem& problem;
    std::int64_t batch;      // b
    Entry entry;             // its lengths
    Acc scale, scale_log2e, softcap, inverse_softcap;
    Acc cap_factor;          // 2 log2(e) scale / softcap
    bool alibi, bias, mask;
    bool elementwise;        // softcap, alibi, bias or mask: not just scale and ranges
    bool has_slope;          // the scores' derivative by scale * q.k is not 1
    bool listed;             // some row has a list of keys
    std::int64_t o_stride;
    RowInfo* info;           // (rows)
    Acc* row_max;            // m (rows)
    Acc* row_shift;          // what is taken off x: m, or 0 as long as the row has seen nothing
    Acc* row_sum;            // l (rows, sums, width), summed at the end
    Acc* o;                  // (rows, o_stride)
    double* o_total;         // the same of the sections of keys before; null: all in o
    double* sum_total;       // of l (rows, sums)
};

template <class E>
FlashBlock<E> make_block(const AttentionProblem& p, std::int64_t b, const Entry& entry) {
    using Acc = typename E::Acc;
    const double cap = computed_cap(p.softcap);
    return {p,
            b,
            entry,
            to_finite<Acc>(p.scale),
            to_finite<Acc>(p.scale * kLog2E),
            Acc(cap),
            Acc(cap > 0 ? 1.0 / cap : 0.0),
            to_finite<Acc>(cap > 0 ? 2 * kLog2E * p.scale / cap : 0.0),
            p.alibi_slopes.data != nullptr,
            p.bias.data != nullptr,
            p.mask.data != nullptr,
            is_elementwise(p),
            cap > 0,
            false,
            0,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
}

// Whether row may attend key j: all restrictions.
template <class E>
bool attends(const FlashBlock<E>& x, const RowInfo& row, std::int64_t j) {
    if (!sees_key(row.begin, row.end, j)) return false;
    if (row.spans.first != nullptr && !in_list(row.spans, j)) return false;
    const ScoreOperand &mask = x.problem.mask, &bias = x.problem.bias;
    if (mask.data != nullptr && !mask_any(mask, x.batch, row.head, row.query, j, 1)) return false;
    return bias.data == nullptr ||
           load_real(bias.data, bias.dtype, score_offset(bias, x.batch, row.head, row.query, j)) !=
               -kInf<double>;
}

template <class E>
bool attends_any(const FlashBlock<E>& x, const RowInfo& row) {
    const ScoreOperand &mask = x.problem.mask, &bias = x.problem.bias;
    if (row.begin >= row.end) return false;
    if (mask.data != nullptr && !mask_any(mask, x.batch, row.head, row.query, row.begin, row.end - row.begin))
        return false;
    if (bias.data == nullptr && (mask.data == nullptr || row.spans.first == nullptr)) return true;
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
    row.position = double(row.query) + double(x.entry.offset);  // any q_offset, no overflow
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

// -inf for the keys j0, j0+1, ... that are not in the row's list.
template <class V, int N>
FASTATTN_INLINE void keep_list(const RowSpans& list, std::int64_t j0, V (&x)[N]) {
    using Acc = typename V::value_type;
    const V masked = V::set1(-kInf<Acc>);
    V kept[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) kept[n] = masked;
    const std::int64_t first = j0 - list.shift;
    for (std::int64_t s = span_after(list, j0); s < list.count; ++s) {
        if (list.first[s].begin >= first + N * V::width) break;
        const V begin = V::set1(Acc(list.first[s].begin - first)),
                end = V::set1(Acc(list.first[s].end - first));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const V key = V::iota() + V::set1(Acc(n * V::width));
            kept[n] = V::select(V::gt(end, key), V::select(V::gt(begin, key), kept[n], x[n]), kept[n]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = kept[n];
}

// -inf for the keys j0, j0+1, ... that the row may not attend.
template <class V, int N>
FASTATTN_INLINE void keep_seen(const RowInfo& row, std::int64_t j0, V (&x)[N]) {
    if (row.spans.first != nullptr) keep_list(row.spans, j0, x);
    keep_range(row, j0, x);
}

// N vectors of a row of bias or mask whose next `left` elements lie `stride` apart.
template <class V, int N, class S>
FASTATTN_INLINE void load_side(const S* p, std::int64_t stride, std::int64_t left, V (&x)[N]) {
    if (stride == 1 && left >= N * V::width) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) x[n] = V::load(p + n * V::width);
    } else {
        for (int n = 0; n < N; ++n)
            x[n] = load_strided<V>(p + n * V::width * stride, stride, left - n * V::width);
    }
}

template <class V, int N>
FASTATTN_INLINE void load_bias(const ScoreOperand& bias, std::int64_t at, std::int64_t left, V (&x)[N]) {
    if constexpr (sizeof(typename V::value_type) == 8) {
        load_side(static_cast<const double*>(bias.data) + at, bias.key, left, x);
    } else {
        switch (bias.dtype) {
            case DType::f16: return load_side(static_cast<const f16_t*>(bias.data) + at, bias.key, left, x);
            case DType::bf16: return load_side(static_cast<const bf16_t*>(bias.data) + at, bias.key, left, x);
            default: return load_side(static_cast<const float*>(bias.data) + at, bias.key, left, x);
        }
    }
}

// x where the mask is set, -inf elsewhere.
template <class V, int N>
FASTATTN_INLINE void keep_mask(const ScoreOperand& mask, std::int64_t at, std::int64_t left, V (&x)[N]) {
    constexpr int keys = N * V::width;
    const auto* p = static_cast<const std::uint8_t*>(mask.data) + at;
    std::uint8_t buffer[keys];
    if (mask.key != 1 || left < keys) {
        for (std::int64_t i = 0; i < keys; ++i) buffer[i] = i < left ? p[i * mask.key] : 0;
        p = buffer;
    }
    const V masked = V::set1(-kInf<typename V::value_type>);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) x[n] = V::select(V::mask_bytes(p + n * V::width), x[n], masked);
}

// Scores beyond the limit count as that; infinite ones stay.
template <class V, int N>
[[gnu::noinline]] void limit_scores(V (&x)[N]) {
    using Acc = typename V::value_type;
    const V limit = V::set1(score_limit<Acc>);
    for (int n = 0; n < N; ++n) {
        const V near = V::max(V::zero() - limit, V::min(limit, x[n]));
        const V size = V::max(x[n], V::zero() - x[n]);
        x[n] = V::select(V::eq(size, V::set1(kInf<Acc>)), x[n], near);
    }
}

// N vectors of raw products q.k become softcap(scale * q.k).
template <class E, int N>
FASTATTN_INLINE void cap_scores(const FlashBlock<E>& x, typename E::V (&t)[N]) {
    using V = typename E::V;
    if (x.softcap > 0) {
        const V cap = V::set1(x.softcap), factor = V::set1(x.cap_factor);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) t[n] = cap * tanh_log2(t[n] * factor);
    } else {
        const V scale = V::set1(x.scale);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) t[n] = t[n] * scale;
    }
}

// The capped scores of keys j, j+1, ... become x, by all other arguments but the key ranges.
template <class E, int N>
FASTATTN_INLINE void place_scores(const FlashBlock<E>& x, const RowInfo& row, std::int64_t j,
                                  typename E::V (&t)[N]) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const AttentionProblem& p = x.problem;
    const std::int64_t left = p.kv_size - j;
    const V zero = V::zero(), log2e = V::set1(Acc(kLog2E));
    if (x.alibi) {
        const V slope = V::set1(to_finite<Acc>(row.slope));
        const V first = V::set1(Acc(row.position - double(j))) - V::iota();
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const V distance = first - V::set1(Acc(n * w));
            t[n] = V::fma(slope, V::max(distance, zero - distance), t[n]);
        }
    }
    if (x.alibi || x.bias) {
        typename V::Mask barred[N] = {};
        const V none = V::set1(-kInf<Acc>);
        if (x.bias) {
            V add[N];
            load_bias(p.bias, row.bias + j * p.bias.key, left, add);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                barred[n] = V::eq(add[n], none);
                t[n] = V::select(barred[n], zero, t[n] + add[n]);
            }
        }
        V high = zero, low = zero;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            high = V::max(t[n], high);
            low = V::min(t[n], low);
        }
        const V limit = V::set1(score_limit<Acc>);
        if (V::any(V::gt(V::max(high, zero - low), limit))) [[unlikely]]
            limit_scores(t);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            t[n] = t[n] * log2e;
            if (x.bias) t[n] = V::select(barred[n], none, t[n]);
        }
    } else {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) t[n] = t[n] * log2e;
    }
    if (x.mask) keep_mask(p.mask, row.mask + j * p.mask.key, left, t);
}

// s: raw products of one row with keys j0, j0+1, ...; becomes x, with -inf where masked. Returns the largest,
// by lane. `vectors` is a multiple of N.
template <class E, int N>
typename E::V transform_row(const FlashBlock<E>& x, const RowInfo& row, typename E::Acc* s, std::int64_t j0,
                            int vectors) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const bool ranged = row.begin > j0 || row.end < j0 + vectors * w || row.spans.first != nullptr;
    V top = V::set1(-kInf<Acc>);
    for (int c = 0; c < vectors; c += N) {
        V t[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) t[n] = V::load(s + (c + n) * w);
        if (x.elementwise) {
            cap_scores(x, t);
            place_scores(x, row, j0 + c * w, t);
        } else {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) t[n] = t[n] * V::set1(x.scale_log2e);
        }
        if (ranged) keep_seen(row, j0 + c * w, t);
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            t[n].store(s + (c + n) * w);
            top = V::max(t[n], top);
        }
    }
    return top;
}

// philox4x32 for the counters c0, c0 + 1, ... of the lanes; words[w] holds word w of each.
template <class V>
FASTATTN_INLINE void philox_words(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                  std::uint64_t seed, typename V::Words (&words)[4]) {
    using Words = typename V::Words;
    std::uint32_t counters[V::width];
    for (int i = 0; i < V::width; ++i) counters[i] = c0 + static_cast<std::uint32_t>(i);
    Words x0, x1 = Words{} + c1, x2 = Words{} + c2, x3 = Words{} + c3;
    std::memcpy(&x0, counters, sizeof x0);
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        Words hi0, lo0, hi1, lo1;
        V::mul_wide(x0, 0xD2511F53u, hi0, lo0);
        V::mul_wide(x2, 0xCD9E8D57u, hi1, lo1);
        x0 = hi1 ^ x1 ^ k0;
        x1 = lo1;
        x2 = hi0 ^ x3 ^ k1;
        x3 = lo0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = x0;
    words[1] = x1;
    words[2] = x2;
    words[3] = x3;
}

// Zeroes dropped weights of the n keys from j on, j a multiple of 4 (scaling by 1/(1-p) waits for the end).
template <class E>
void drop_weights(const FlashBlock<E>& x, const RowInfo& row, typename E::Acc* p, std::int64_t j, int n) {
    using V = typename E::V;
    const std::uint32_t threshold = dropout_threshold(x.problem.dropout);
    const auto word = [](std::int64_t i) { return static_cast<std::uint32_t>(i); };
    int done = 0;
    if constexpr (sizeof(typename E::Acc) == 4) {
        constexpr int w = V::width;
        while (n - done >= w) {
            const int vectors = (n - done) / w < 4 ? (n - done) / w : 4;
            typename V::Words words[4];
            philox_words<V>(word((j + done) / 4), word(row.query), word(row.head), word(x.batch),
                            x.problem.seed, words);
            V keep[4];  // all ones or zeros; by lane of the counter, then by key
            for (int k = 0; k < 4; ++k) {
                words[k] = (typename V::Words)(words[k] >= threshold);
                std::memcpy(&keep[k], &words[k], sizeof keep[k]);
            }
            const V even_lo = V::interleave_lo(keep[0], keep[2]),
                    even_hi = V::interleave_hi(keep[0], keep[2]);
            const V odd_lo = V::interleave_lo(keep[1], keep[3]), odd_hi = V::interleave_hi(keep[1], keep[3]);
            const V by_key[4] = {V::interleave_lo(even_lo, odd_lo), V::interleave_hi(even_lo, odd_lo),
                                 V::interleave_lo(even_hi, odd_hi), V::interleave_hi(even_hi, odd_hi)};
            for (int k = 0; k < vectors; ++k) {
                typename V::Words weight, mask;
                std::memcpy(&mask, &by_key[k], sizeof mask);
                std::memcpy(&weight, p + done + k * w, sizeof weight);
                weight &= mask;
                std::memcpy(p + done + k * w, &weight, sizeof weight);
            }
            done += vectors * w;
        }
    }
    PhiloxBlock block{};
    for (; done < n; ++done) {
        if ((j + done) % 4 == 0) {
            block = philox4x32(word((j + done) / 4), word(row.query), word(row.head), word(x.batch),
                               x.problem.seed);
        }
        if (block.word[(j + done) % 4] < threshold) p[done] = 0;
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
    if (x.o_total == nullptr) return;
    for (std::int64_t c = 0; c < x.o_stride; ++c) x.o_total[r * x.o_stride + c] *= double(factor);
    for (int s = 0; s < E::sums; ++s) x.sum_total[r * E::sums + s] *= double(factor);
}

// The end of a section of keys: what row r has summed moves to its totals.
template <class E>
void end_section(const FlashBlock<E>& x, std::int64_t r) {
    using V = typename E::V;
    const auto* o = x.o + r * x.o_stride;
    double* const total = x.o_total + r * x.o_stride;
    for (std::int64_t c = 0; c < x.o_stride; ++c) total[c] += double(o[c]);
    for (int s = 0; s < E::sums; ++s) {
        auto* l = x.row_sum + (r * E::sums + s) * V::width;
        double sum = 0;
        for (int i = 0; i < V::width; ++i) sum += double(l[i]);
        x.sum_total[r * E::sums + s] += sum;
        V::zero().store(l);
    }
}

// After the last section: the totals take the place of the sums.
template <class E>
void take_totals(const FlashBlock<E>& x, std::int64_t r) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const double* const total = x.o_total + r * x.o_stride;
    for (std::int64_t c = 0; c < x.o_stride; ++c) x.o[r * x.o_stride + c] = static_cast<Acc>(total[c]);
    for (int s = 0; s < E::sums; ++s)
        x.row_sum[(r * E::sums + s) * V::width] = static_cast<Acc>(x.sum_total[r * E::sums + s]);
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
    x.row_max[r] = x.row_shift[r] = raised;
    if (!fresh) rescale_row(x, r, raised - old, p, first, column);
}

template <class E>
FASTATTN_INLINE typename E::V row_shift(const FlashBlock<E>& x, std::int64_t r) {
    return E::V::set1(x.row_shift[r]);
}

}  // namespace
}  // namespace fastattn::cpu
