// What the parts of the backward pass share: the arguments, a thread's buffers, and which block of rows is
// being computed against which block of keys.
//
//   k, v (panels, D or Dv units, nr)      k rows (panels of D, keys, nr)       P, dS (rows, keys)
//   q, dout rows (rows, D or Dv units)    q, dout panels (panels, rows, nr)
#pragma once

#include "cpu/backward/call.h"
#include "cpu/flash/item.h"

namespace fastattn::cpu {
namespace {

// x - shift is the exponent of P / factor: shift is lse in powers of two, rounded to an integer.
template <class Acc>
struct BackwardRow {
    Acc shift, factor, delta;  // delta = dout . out - dlse
};

// In the workspace of a thread.
template <class E>
struct BackwardBuffers {
    using Unit = typename E::Unit;
    using Acc = typename E::Acc;
    Unit *k_panels, *v_panels, *k_rows;
    Unit *q_rows, *dout_rows, *q_panels, *dout_panels;
    Unit *weights, *ds, *ds_rows;  // P and dS as the products with dout and q take them, dS for that with k
    Acc *x, *p, *kept, *dp, *cap;  // a panel; kept: P after dropout, cap: the derivative of the softcap
    Acc *dk, *dv, *dq, *dq_chunk, *dbias;
    double *dk_total, *dv_total, *dq_total, *dbias_total;  // where the plan has sections
    BackwardRow<Acc>* rows;
    RowInfo* info;
    TileColumns* tiles;
    std::uint8_t *bad_k, *bad_q, *bad_dout;  // which keys and rows hold NaN or Inf, where any does
};

template <class E>
BackwardBuffers<E> backward_buffers(const BackwardOffsets& at, const BackwardPlan& plan,
                                    std::byte* workspace) {
    using Acc = typename E::Acc;
    auto units = [&](std::size_t offset) { return reinterpret_cast<typename E::Unit*>(workspace + offset); };
    auto accs = [&](std::size_t offset) { return reinterpret_cast<Acc*>(workspace + offset); };
    auto bytes = [&](std::size_t offset) { return reinterpret_cast<std::uint8_t*>(workspace + offset); };
    BackwardBuffers<E> to;
    to.k_panels = units(at.k_panels), to.v_panels = units(at.v_panels), to.k_rows = units(at.k_rows);
    to.q_rows = units(at.q_rows), to.dout_rows = units(at.dout_rows);
    to.q_panels = units(at.q_panels), to.dout_panels = units(at.dout_panels);
    to.weights = units(at.weights), to.ds = units(at.ds), to.ds_rows = units(at.ds_rows);
    to.x = accs(at.x), to.p = accs(at.p), to.kept = accs(at.kept), to.dp = accs(at.dp), to.cap = accs(at.cap);
    to.dk = accs(at.dk), to.dv = accs(at.dv), to.dq = accs(at.dq), to.dq_chunk = accs(at.dq_chunk);
    to.dbias = accs(at.dbias);
    auto doubles = [&](std::size_t offset) { return reinterpret_cast<double*>(workspace + offset); };
    to.dk_total = plan.sections ? doubles(at.totals) : nullptr;
    to.dv_total = plan.sections ? to.dk_total + plan.key_block * plan.d_stride : nullptr;
    to.dq_total = plan.dq_sections ? doubles(at.dq_total) : nullptr;
    to.dbias_total = plan.bias_sections ? doubles(at.dbias_total) : nullptr;
    to.rows = reinterpret_cast<BackwardRow<Acc>*>(workspace + at.states);
    to.info = reinterpret_cast<RowInfo*>(workspace + at.info);
    to.tiles = reinterpret_cast<TileColumns*>(workspace + at.tiles);
    to.bad_k = bytes(at.bad_k), to.bad_q = bytes(at.bad_q), to.bad_dout = bytes(at.bad_dout);
    return to;
}

// Keys [first, first + size) of a kv head. They are packed when the first rows come that attend any of them.
struct KeyBlock {
    std::int64_t head = 0, first = 0, size = 0;
    bool packed = false;
    bool bad_key = false, bad_value = false;  // NaN or Inf among k, among v
};

// Rows [first, first + live) of a query head; zeros fill up the last tile of them.
struct RowBlock {
    std::int64_t head = 0, first = 0, live = 0, padded = 0;
    bool bad_query = false, bad_gradient = false;  // NaN or Inf among q, among dout
};

// What is prefetched while P and dS of a block of rows are computed: rows that are read after it, and rows of
// results.
struct BackwardAhead {
    RowPrefetch<false> q, dout, k, v;
    RowPrefetch<true> dq, dk, dv;
    std::int64_t share = 0;  // rows of each for a tile

    FASTATTN_INLINE void advance() {
        q.advance(share);
        dout.advance(share);
        k.advance(share);
        v.advance(share);
        dq.advance(share);
        dk.advance(share);
        dv.advance(share);
    }
};

// A block of rows against a block of keys.
template <class E>
struct BackwardBlock {
    using Acc = typename E::Acc;

    const BackwardProblem& problem;
    const AttentionProblem& forward;
    const BackwardSchedule& schedule;
    const BackwardPlan& plan;
    Executor& executor;
    FlashBlock<E> x;  // its batch entry is the block's
    BackwardBuffers<E> at;
    // Shared by all threads:
    BackwardRow<Acc>* states;  // of all rows: row_number
    double* slopes;  // sums for dalibi: (rows, most_chunks)
    double* bias_sums;  // see BackwardSchedule
    // The thread's own:
    std::int64_t d_units, v_units;  // of a row of q and k, of dout and v
    Acc keep_factor;  // of weights that dropout leaves
    bool alibi;  // dalibi is asked for
    bool into_bias = false;  // dS goes into dbias and nowhere else
    std::int64_t chunk = 0;  // that the block of keys belongs to
    KeyBlock keys;
    RowBlock rows;
    BackwardAhead ahead;
    bool careful = false;  // NaN or Inf in anything that the block reads

    BackwardBlock(const BackwardCall& call, const BackwardPlan& plan_of_item, std::int64_t b,
                  const Entry& lengths, std::byte* workspace)
        : problem(call.problem),
          forward(problem.forward),
          schedule(call.schedule),
          plan(plan_of_item),
          executor(call.executor),
          x(make_block<E>(forward, b, lengths)),
          at(backward_buffers<E>(backward_offsets(problem, plan, tile_shape<E>()), plan, workspace)),
          states(reinterpret_cast<BackwardRow<Acc>*>(call.shared + schedule.states)),
          slopes(reinterpret_cast<double*>(call.shared + schedule.slopes)),
          bias_sums(reinterpret_cast<double*>(call.shared + schedule.bias_sums)),
          d_units((forward.head_dim + E::scalars - 1) / E::scalars),
          v_units((forward.value_dim + E::scalars - 1) / E::scalars),
          keep_factor(Acc(1.0 / (1.0 - forward.dropout))),
          alibi(problem.dalibi.data != nullptr) {
        x.info = at.info;
    }

    // For passes that go through entries.
    void go_to_entry(std::int64_t b) {
        x.batch = b;
        x.entry = entry_at(schedule.entries, b).lengths;
    }
};

// n sums move to their totals.
template <class Acc>
void end_section(Acc* sums, double* totals, std::int64_t n) {
    for (std::int64_t c = 0; c < n; ++c) {
        totals[c] += double(sums[c]);
        sums[c] = 0;
    }
}

// Zeros for n numbers, rounded up to whole vectors.
template <class V>
void clear_vectors(typename V::value_type* to, std::int64_t n) {
    for (std::int64_t c = 0; c < n; c += V::width) V::zero().store(to + c);
}

}  // namespace
}  // namespace fastattn::cpu
