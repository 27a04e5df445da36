// From the sums of a row to what the caller gets: out, lse, weights; and merging of key splits.
//
//   out = O * 2^(m-M) / L / (1 - dropout), L = l * 2^(m-M) + 2^(sink*log2e - M),   lse = (M + log2 L) * ln 2
#pragma once

#include "cpu/flash/softmax.h"

namespace fastattn::cpu {
namespace {

template <class S>
S* row_pointer(const Operand& x, std::int64_t b, std::int64_t i, std::int64_t h) {
    return static_cast<S*>(x.data) + b * x.batch + i * x.seq + h * x.head;
}

inline void write_lse(const AttentionProblem& p, std::int64_t b, const RowInfo& row, double lse) {
    if (p.lse.data == nullptr) return;
    const std::int64_t at = score_offset(p.lse, b, row.head, row.query, 0);
    if (p.lse.dtype == DType::f64) {
        static_cast<double*>(p.lse.data)[at] = lse;
    } else {
        static_cast<float*>(p.lse.data)[at] = static_cast<float>(lse);
    }
}

// (top + log2(denominator)) * ln 2. At score_limit all that is known is that the score was about the dtype's
// largest number.
template <class Acc>
double log_sum(double top, double denominator) {
    constexpr double most = double(std::numeric_limits<Acc>::max()), edge = double(score_limit<Acc>) * 1.44;
    if (top <= -edge) return -most;
    if (top >= edge && top < kInf<double>) return most;
    return (top + ::log2(denominator)) / kLog2E;
}

// What the weights 2^(x-m) of a row are multiplied with to be a share of the sum: as computed, and as v was
// multiplied with them (and dropout).
struct RowFactors {
    double weight, output;
};

// The factors of one row from m and l; writes its lse. rounded_l is the sum of the weights as v was
// multiplied with them.
template <class E>
FASTATTN_INLINE RowFactors finish_sums(const FlashBlock<E>& x, const RowInfo& row, double m, double l,
                                       double rounded_l) {
    const AttentionProblem& p = x.problem;
    constexpr double inf = kInf<double>;
    double sink = -inf;
    if (p.sinks.data != nullptr && row.query < x.entry.q_len) sink = read_head(p.sinks, 0, row.head) * kLog2E;

    RowFactors factors;
    double lse;
    if (sink == inf) {
        factors.weight = factors.output = l == l ? 0.0 : l;
        lse = inf;
    } else if (l == 0 || m == -inf) {
        // l is 0, or NaN: no finite or infinite score, or only masked ones.
        const bool nothing = l == 0 && !attends_any(x, row);
        const double denominator = l + (sink == -inf ? 0.0 : 1.0);
        factors.weight = factors.output = nothing ? 0.0 : (sink == sink ? 0.0 / denominator : sink);
        lse = l == 0 ? sink / kLog2E : l;
    } else {
        double top = m, share = 1.0, sink_share = 0.0;
        if (sink != -inf) {
            top = sink > m ? sink : m;
            share = ::exp2(m - top);
            sink_share = ::exp2(sink - top);
        }
        factors.weight = factors.output = share / (l * share + sink_share);
        if (E::sums > 1) factors.output = share / (rounded_l * share + sink_share);
        lse = p.lse.data == nullptr ? 0.0 : log_sum<typename E::Acc>(top, l * share + sink_share);
    }
    if (p.dropout > 0) factors.output /= 1.0 - p.dropout;
    write_lse(p, x.batch, row, lse);
    return factors;
}

// T: the dtype of out.
template <class E, class T>
FASTATTN_INLINE void write_numbers(const FlashBlock<E>& x, const RowInfo& row, double factor,
                                   const typename E::Acc* o) {
    using V = typename E::V;
    const AttentionProblem& p = x.problem;
    const V scale = V::set1(static_cast<typename E::Acc>(factor));
    T* out = row_pointer<T>(p.out, x.batch, row.query, row.head);
    for (std::int64_t c = 0; c < p.value_dim; c += V::width) {
        store_strided(V::load(o + c) * scale, out + c * p.out.dim, p.out.dim, p.value_dim - c);
    }
}

// Writes the output of one row, in q's dtype S, or unrounded.
template <class E, class S>
FASTATTN_INLINE void write_output(const FlashBlock<E>& x, const RowInfo& row, double factor,
                                  const typename E::Acc* o) {
    if (x.problem.out_dtype == x.problem.dtype) {
        write_numbers<E, S>(x, row, factor, o);
    } else {
        write_numbers<E, typename E::Acc>(x, row, factor, o);
    }
}

// One partial result of a split: m, l, rounded l, then O from kPartialHeader on.
template <class E>
void write_partial(const FlashBlock<E>& x, std::int64_t r, typename E::Acc* partial) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    partial[0] = x.row_max[r];
    partial[1] = static_cast<Acc>(total_weight(x, r, false));
    partial[2] = static_cast<Acc>(total_weight(x, r, true));
    const auto* o = x.o + r * x.o_stride;
    for (std::int64_t c = 0; c < x.o_stride; c += V::width)
        V::load(o + c).store(partial + kPartialHeader + c);
}

// Merges the partial results of one row in the order of the keys and writes the output.
template <class E, class S>
void merge_row(const FlashBlock<E>& x, const RowInfo& row, typename E::Acc* partials, std::int64_t splits,
               std::int64_t stride) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    Acc top = -kInf<Acc>;
    for (std::int64_t s = 0; s < splits; ++s) {
        if (partials[s * stride] > top) top = partials[s * stride];
    }
    double l = 0, rounded_l = 0;
    // Summed in place: into the first of each kAtOnce, then into the first of all, as short sums round less.
    constexpr std::int64_t kAtOnce = 16;
    Acc* const first = partials + kPartialHeader;
    for (std::int64_t s = 0; s < splits; ++s) {
        const Acc* part = partials + s * stride;
        Acc* const o = first + s / kAtOnce * kAtOnce * stride;
        const Acc m = part[0];
        // m is an integer or infinite; a split that saw nothing (-inf) has l = 0 or NaN, as it is.
        const double share = m == -kInf<Acc> || m == top ? 1.0 : ::exp2(double(m) - double(top));
        l += double(part[1]) * share;
        rounded_l += double(part[2]) * share;
        const V factor = V::set1(Acc(share));
        for (std::int64_t c = 0; c < x.o_stride; c += V::width) {
            const V y = V::load(part + kPartialHeader + c) * factor;
            (s % kAtOnce == 0 ? y : V::load(o + c) + y).store(o + c);
        }
    }
    for (std::int64_t s = kAtOnce; s < splits; s += kAtOnce) {
        const Acc* part = first + s * stride;
        for (std::int64_t c = 0; c < x.o_stride; c += V::width)
            (V::load(first + c) + V::load(part + c)).store(first + c);
    }
    write_output<E, S>(x, row, finish_sums(x, row, double(top), l, rounded_l).output, first);
}

}  // namespace
}  // namespace fastattn::cpu
