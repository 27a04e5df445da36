// The blocks of the backward pass: which keys and rows they have, packed as the products take them.
#pragma once

#include "cpu/backward/block.h"
#include "cpu/flash/pack.h"

namespace fastattn::cpu {
namespace {

// Rows from i on of a query head.
template <class S>
struct QueryRows {
    const S* first;
    std::int64_t row, number;

    QueryRows(const Operand& x, std::int64_t b, std::int64_t i, std::int64_t head)
        : first(row_pointer<const S>(x, b, i, head)), row(x.seq), number(x.dim) {}
    const S* operator[](std::int64_t r) const { return first + r * row; }
    std::int64_t number_stride() const { return number; }
};

// Keys from j on of a kv head that has `all`.
template <class E>
void start_keys(BackwardBlock<E>& block, std::int64_t kv_head, std::int64_t j, std::int64_t all) {
    const std::int64_t left = all - j;
    block.keys = {};
    block.keys.head = kv_head;
    block.keys.first = j;
    block.keys.size = left < block.plan.key_block ? left : block.plan.key_block;
}

template <class E, class K, class W>
void pack_key_block(BackwardBlock<E>& block) {
    using V = typename E::V;
    constexpr int w = V::width;
    const AttentionProblem& p = block.forward;
    const BackwardBuffers<E>& at = block.at;
    KeyBlock& keys = block.keys;
    const KeyRows<K> k(p.k, block.x.batch, keys.head);
    const KeyRows<W> v(p.v, block.x.batch, keys.head);
    const RowsFrom block_k{k, keys.first}, block_v{v, keys.first};
    pack_keys<E>(at.k_panels, block_k, keys.size, p.head_dim);
    pack_keys<E>(at.v_panels, block_v, keys.size, p.value_dim);
    keys.bad_key = pack_values<E>(at.k_rows, at.bad_k, block_k, keys.size, (keys.size + w - 1) / w * w,
                                  block.plan.key_block, p.head_dim);
    V check = V::zero();
    for (std::int64_t c = 0; c < keys.size; ++c) {
        for (std::int64_t d = 0; d < p.value_dim; d += w)
            check = V::fma(
                load_strided<V>(block_v[c] + d * v.number_stride(), v.number_stride(), p.value_dim - d),
                V::zero(), check);
    }
    keys.bad_value = !(V::reduce_add(check) == 0);
    keys.packed = true;
}

// Whether any of n rows from i on of head h, a block, attends any of the keys [first, first + keys), by
// ranges and lists.
inline bool rows_attend(const AttentionProblem& p, const BackwardPlan& plan, const Entry& entry,
                        std::int64_t h, std::int64_t i, std::int64_t n, std::int64_t first,
                        std::int64_t keys) {
    if (n == 0) return false;
    const KeyRange range = range_of_rows(entry_keys(p, entry, i), entry_keys(p, entry, i + n - 1));
    if (range.begin >= first + keys || range.end <= first) return false;
    if (entry.lists.index == nullptr) return true;
    if (plan.hulls != nullptr) {
        const KeyRange& hull = plan.hulls[h * plan.hull_head + i / plan.row_block];
        if (hull.begin >= first + keys || hull.end <= first) return false;
    }
    RowInfo before{};
    for (std::int64_t r = i; r < i + n; ++r) {
        const RowInfo row = row_info(p, entry, r, h);
        if (r > i && see_alike(row, before)) continue;
        if (seen_by_row(row, first, keys) != Seen::none) return true;
        before = row;
    }
    return false;
}

// The first block of rows from i on, of head h, that has weights in the keys; q_len if there is none.
inline std::int64_t next_rows(const AttentionProblem& p, const BackwardPlan& plan, const Entry& entry,
                              std::int64_t h, std::int64_t i, std::int64_t first, std::int64_t keys) {
    for (; i < entry.q_len; i += plan.row_block) {
        const std::int64_t left = entry.q_len - i;
        if (rows_attend(p, plan, entry, h, i, left < plan.row_block ? left : plan.row_block, first, keys))
            return i;
    }
    return entry.q_len;
}

// Asks for the next block of rows; beside the last one of a block of keys for the gradients of these, and the
// next keys.
template <class E, class S, class K, class W>
void plan_ahead(BackwardBlock<E>& block) {
    constexpr std::int64_t kMostShare = 64;  // between two questions whether to stop
    constexpr std::int64_t kMostBytes = 512 * 1024;  // of dq: more has no place in L2
    const AttentionProblem& p = block.forward;
    const BackwardProblem& problem = block.problem;
    const KeyBlock& keys = block.keys;
    BackwardAhead& ahead = block.ahead;
    ahead = {};
    if (block.into_bias) return;  // another order of blocks
    std::int64_t most = 0;
    const auto ask = [&]<class T, bool for_writing>(
                         T, RowPrefetch<for_writing>& to, const Operand& x, std::int64_t b, std::int64_t i,
                         std::int64_t h, std::int64_t dim, std::int64_t n, std::int64_t heads = 1) {
        to = rows_ahead<T, for_writing>(x, b, i, h, dim, n, heads);
        if (n * heads > most) most = n * heads;
    };
    const auto rest = [](std::int64_t size, std::int64_t first, std::int64_t n) {
        return size - first < n ? size - first : n;
    };
    const std::int64_t first_head = keys.head * p.group;
    std::int64_t b = block.x.batch, head = block.rows.head;
    std::int64_t rows_on = 0,
                 keys_on = 0;  // to the next item's, where entries are packed (core/entry_view.h)
    const BackwardPlan* plan = &block.plan;
    const Entry* entry = &block.x.entry;
    std::int64_t row =
        next_rows(p, *plan, *entry, head, block.rows.first + plan->row_block, keys.first, keys.size);
    if (row == entry->q_len && ++head < first_head + p.group)
        row = next_rows(p, *plan, *entry, head, 0, keys.first, keys.size);
    if (row == entry->q_len) {
        ask(K{}, ahead.dk, problem.dk, b, keys.first, keys.head, p.head_dim, keys.size);
        ask(W{}, ahead.dv, problem.dv, b, keys.first, keys.head, p.value_dim, keys.size);
        std::int64_t kv_head = keys.head, key = keys.first + plan->key_block;
        if (key >= entry->kv_len || (plan->split && key % (plan->chunk_blocks * plan->key_block) == 0)) {
            const std::int64_t dq_bytes =
                p.group * entry->q_len * p.head_dim * static_cast<std::int64_t>(sizeof(S));
            if (!plan->split && dq_bytes <= kMostBytes)
                ask(S{}, ahead.dq, problem.dq, b, 0, first_head, p.head_dim, entry->q_len, p.group);
            const std::int64_t next = block.executor.next_item();
            key = entry->kv_len;
            if (next < block.schedule.items) {
                const Place<BackwardEntry> place =
                    place_of(block.schedule.entries, &BackwardEntry::items, next);
                rows_on = place.entry->lengths.first_row - entry->first_row;
                keys_on = place.entry->lengths.first_key - entry->first_key;
                b = place.batch;
                plan = &place.entry->plan;
                entry = &place.entry->lengths;
                kv_head = place.item % p.kv_heads;
                key = place.item / p.kv_heads * plan->chunk_blocks * plan->key_block;
                row = entry->q_len;
            }
        }
        if (key < entry->kv_len) {
            const std::int64_t n = rest(entry->kv_len, key, plan->key_block);
            ahead.k = keys_ahead(KeyRows<K>(p.k, b, kv_head), key + keys_on, p.head_dim, n);
            ahead.v = keys_ahead(KeyRows<W>(p.v, b, kv_head), key + keys_on, p.value_dim, n);
            if (n > most) most = n;
            head = kv_head * p.group;
            row = next_rows(p, *plan, *entry, head, 0, key, n);
        }
    }
    if (row < entry->q_len) {
        const std::int64_t n = rest(entry->q_len, row, plan->row_block);
        ask(S{}, ahead.q, p.q, b, row + rows_on, head, p.head_dim, n);
        ask(S{}, ahead.dout, problem.dout, b, row + rows_on, head, p.value_dim, n);
    }
    const std::int64_t tiles = block.rows.padded / E::mr, share = (most + tiles - 1) / tiles;
    ahead.share = share < kMostShare ? share : kMostShare;
}

// Rows from i on of a query head. False when none of them has weights in the block of keys.
template <class E, class S, class K, class W>
bool start_rows(BackwardBlock<E>& block, std::int64_t head, std::int64_t i) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const AttentionProblem& p = block.forward;
    const BackwardPlan& plan = block.plan;
    const BackwardBuffers<E>& at = block.at;
    const KeyBlock& keys = block.keys;
    RowBlock& rows = block.rows;
    FlashBlock<E>& x = block.x;
    const std::int64_t left = x.entry.q_len - i, live = left < plan.row_block ? left : plan.row_block;
    if (!rows_attend(p, plan, x.entry, head, i, live, keys.first, keys.size)) return false;
    if (!keys.packed) pack_key_block<E, K, W>(block);
    static_assert(E::mr % E::scalars == 0);
    const std::int64_t padded = (live + E::mr - 1) / E::mr * E::mr;
    rows = {};
    rows.head = head;
    rows.first = i;
    rows.live = live;
    rows.padded = padded;
    const Operand& d = block.problem.dout;
    const QueryRows<S> q(p.q, x.batch, i, head), dout(d, x.batch, i, head);
    bool finite = true;
    for (std::int64_t r = 0; r < padded; ++r) {
        RowInfo info{};
        BackwardRow<Acc> state{};
        if (r < live) {
            info = row_info(p, x.entry, i + r, head);
            if (x.elementwise || block.alibi) find_features(x, info);
            state = block.states[row_number(p, x.batch, x.entry, head, i + r)];
            pack_row<E>(at.q_rows + r * plan.q_units, q[r], p.q.dim, p.head_dim);
            pack_row<E>(at.dout_rows + r * plan.v_units, dout[r], d.dim, p.value_dim);
        } else {
            clear_vectors<V>(at.q_rows + r * plan.q_units, plan.q_units);
            clear_vectors<V>(at.dout_rows + r * plan.v_units, plan.v_units);
        }
        const Acc sum = state.shift + state.factor + state.delta;
        finite = finite && sum - sum == 0;
        at.rows[r] = state;
        x.info[r] = info;
    }
    if (!block.into_bias) {
        rows.bad_query = pack_values<E>(at.q_panels, at.bad_q, q, live, padded, plan.row_block, p.head_dim);
        rows.bad_gradient =
            pack_values<E>(at.dout_panels, at.bad_dout, dout, live, padded, plan.row_block, p.value_dim);
    }
    plan_ahead<E, S, K, W>(block);
    block.careful = !finite || keys.bad_key || keys.bad_value || rows.bad_query || rows.bad_gradient;
    return true;
}

}  // namespace
}  // namespace fastattn::cpu
