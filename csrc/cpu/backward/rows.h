// The backward pass by rows: before the blocks, lse and delta of each row as these take them; after them, the
// gradients of what a head has one of, summed over its rows.
#pragma once

#include "cpu/backward/block.h"
#include "cpu/backward/scores.h"
#include "cpu/flash/gemm.h"
#include "cpu/flash/pack.h"

namespace fastattn::cpu {
namespace {

inline double magnitude(double x) { return x < 0 ? -x : x; }

// From this size on lse says too little of the sum of the weights, which is up to the number of keys: beside
// a bias of -1e9, that some use as a mask, nothing.
template <class Acc>
inline constexpr double kCoarse = 1.0 / 1024 / double(std::numeric_limits<Acc>::epsilon());

template <class E>
RowInfo row_of(const FlashBlock<E>& x, std::int64_t h, std::int64_t i) {
    RowInfo row = row_info(x.problem, x.entry, i, h);
    find_features(x, row);
    return row;
}

// The row's largest score and its sum of weights anew, as the panels compute them; used where they agree with
// lse as far as that tells (it may be of more keys than these).
template <class E, class S, class K>
void refine_weights(const BackwardBlock<E>& block, std::int64_t h, std::int64_t i, double lse,
                    BackwardRow<typename E::Acc>& state) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const AttentionProblem& p = block.forward;
    const BackwardBuffers<E>& at = block.at;
    const RowInfo row = row_of(block.x, h, i);
    const KeyRows<K> k(p.k, block.x.batch, h / p.group);
    pack_row<E>(at.q_rows, row_pointer<const S>(p.q, block.x.batch, i, h), p.q.dim, p.head_dim);
    const bool sink = p.sinks.data != nullptr;
    double top = sink ? read_head(p.sinks, 0, h) * kLog2E : -kInf<double>,
           sum = top > -kInf<double> ? 1.0 : 0.0;
    for (std::int64_t j = row.begin / E::nr * E::nr; j < row.end; j += E::nr) {
        const std::int64_t left = block.x.entry.kv_len - j;
        pack_keys<E>(at.k_panels, RowsFrom{k, j}, left < E::nr ? left : E::nr, p.head_dim);
        V acc[1][E::nv];
#pragma GCC unroll 8
        for (int n = 0; n < E::nv; ++n) acc[0][n] = V::zero();
        gemm_tile<E, 1, E::nv>(acc, at.q_rows, 0, at.k_panels, E::nr, 0, block.d_units);
#pragma GCC unroll 8
        for (int n = 0; n < E::nv; ++n) acc[0][n].store(at.x + n * V::width);
        find_scores(block.x, row, j, false, at.x, at.cap);
        for (int c = 0; c < E::nr; ++c) {
            const double x = double(at.x[c]);
            if (x == -kInf<double>) continue;
            if (x > top) {
                sum *= ::exp2(top - x);
                top = x;
            }
            sum += ::exp2(x - top);
        }
    }
    const double found = (top + ::log2(sum)) / kLog2E;
    const bool agree =
        magnitude(found - lse) <= 4 * double(std::numeric_limits<Acc>::epsilon()) * magnitude(lse);
    // At its type's largest number lse says nothing but that.
    const bool at_limit = magnitude(lse) >= double(std::numeric_limits<Acc>::max());
    if (!agree && !at_limit) return;
    state.shift = Acc(top);
    state.factor = Acc(1.0 / sum);
}

template <class E, class S, class K>
BackwardRow<typename E::Acc> find_state(const BackwardBlock<E>& block, std::int64_t h, std::int64_t i) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const BackwardProblem& b = block.problem;
    const AttentionProblem& p = block.forward;
    const std::int64_t batch = block.x.batch;
    const S* dout = row_pointer<const S>(b.dout, batch, i, h);
    const S* out = row_pointer<const S>(p.out, batch, i, h);
    V sum = V::zero();
    for (std::int64_t d = 0; d < p.value_dim; d += w) {
        const std::int64_t left = p.value_dim - d;
        sum = V::fma(load_strided<V>(dout + d * b.dout.dim, b.dout.dim, left),
                     load_strided<V>(out + d * p.out.dim, p.out.dim, left), sum);
    }
    BackwardRow<Acc> state{};
    state.delta = V::reduce_add(sum);
    if (!(state.delta - state.delta == 0) && !attends_any(block.x, row_of(block.x, h, i))) state.delta = 0;
    if (b.dlse.data != nullptr)
        state.delta -= Acc(load_real(b.dlse.data, b.dlse.dtype, score_offset(b.dlse, batch, h, i, 0)));
    const double lse = load_real(p.lse.data, p.lse.dtype, score_offset(p.lse, batch, h, i, 0));
    if (lse == -kInf<double>) return state;  // nothing attended, or only scores of -inf: no weights
    const double t = lse * kLog2E, whole = ::rint(t);
    state.shift = to_finite<Acc>(whole);
    const bool finite = t - t == 0;  // in powers of two too

    // Beyond 2^31 the shift may be further from lse than the type's exponents reach; such weights are 0 or
    // wrong.
    const double rest = double(state.shift) - t;
    state.factor = finite ? Acc(::exp2(rest > 126 ? 126 : (rest < -126 ? -126 : rest))) : Acc(1);
    if (!finite) state.shift = Acc(t);
    if (lse - lse == 0 && magnitude(t) > kCoarse<Acc>) refine_weights<E, S, K>(block, h, i, lse, state);
    return state;
}

// lse and delta of some rows of a batch entry, in the order of the addresses: the heads of a query, or the
// queries of a head.
template <class E, class S, class K>
void prepare_rows(BackwardBlock<E>& block, std::int64_t item) {
    const AttentionProblem& p = block.forward;
    const Entry& entry = block.x.entry;
    const std::int64_t all = p.q_heads * entry.q_size, b = block.x.batch;
    const std::int64_t begin = item * kRowsPerPreparation;
    const std::int64_t most = begin + kRowsPerPreparation, end = most < all ? most : all;
    const bool heads_first = heads_side_by_side(block.problem.dout);
    for (std::int64_t r = begin; r < end && !block.executor.stop_requested(); ++r) {
        const std::int64_t h = heads_first ? r % p.q_heads : r / entry.q_size;
        const std::int64_t i = heads_first ? r / p.q_heads : r % entry.q_size;
        BackwardRow<typename E::Acc>& state = block.states[row_number(p, b, entry, h, i)];
        state = {};
        if (i < entry.q_len) state = find_state<E, S, K>(block, h, i);
    }
}

// d/dsink of one row: its weight times -(delta); of a sink of +inf all the weight.
template <class Acc>
double sink_gradient(double sink, const BackwardRow<Acc>& state) {
    if (sink == -kInf<double>) return 0.0;
    if (sink == kInf<double>) return -double(state.delta);
    // A row without weights (factor 0) has lse = sink.
    const double share =
        state.factor == 0 ? 1.0 : ::exp2(sink * kLog2E - double(state.shift)) * double(state.factor);
    return -share * double(state.delta);
}

inline void store_head(const ScoreOperand& to, std::int64_t b, std::int64_t h, double value) {
    store_real(to.data, to.dtype, score_offset(to, b, h, 0, 0), value);
}

// dalibi_slopes and dsinks of a head.
template <class E>
void find_head_gradients(const BackwardBlock<E>& block, std::int64_t h) {
    const AttentionProblem& p = block.forward;
    const ScoreOperand &dalibi = block.problem.dalibi, &dsinks = block.problem.dsinks;
    const std::int64_t stride = block.schedule.most_chunks;
    double sink_sum = 0, slope_sum = 0;
    const double sink = dsinks.data == nullptr ? 0.0 : read_head(p.sinks, 0, h);
    for (std::int64_t b = 0; b < p.batch; ++b) {
        if (dalibi.batch != 0) slope_sum = 0;
        const BackwardEntry& entry = entry_at(block.schedule.entries, b);
        for (std::int64_t i = 0; i < entry.lengths.q_len; ++i) {
            const std::int64_t row = row_number(p, b, entry.lengths, h, i);
            if (dsinks.data != nullptr) sink_sum += sink_gradient(sink, block.states[row]);
            for (std::int64_t c = 0; block.alibi && c < entry.plan.chunks; ++c)
                slope_sum += double(block.slopes[row * stride + c]);
        }
        if (block.alibi && dalibi.batch != 0) store_head(dalibi, b, h, slope_sum);
    }
    if (block.alibi && dalibi.batch == 0) store_head(dalibi, 0, h, slope_sum);
    if (dsinks.data != nullptr) store_head(dsinks, 0, h, sink_sum);
}

}  // namespace
}  // namespace fastattn::cpu
