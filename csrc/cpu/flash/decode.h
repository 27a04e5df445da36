// Decode: few query rows (R = Sq * G, see most_decode_rows) per head, so that reading k and v is what takes
// the time. They are used where they lie, once for all rows, and in the order of the addresses: a few keys of
// all the heads of the item, then the next ones. While the keys of a block of kDecodeBlock are computed its
// values are on their way from memory, and then the keys of the next block. With one row for each head see
// DecodeScores::score_rows.
//
//   q (heads*R, D)  k, v rows in memory, any storage type  scores, p (heads*R, kDecodeBlock)  O (heads*R, Dv)
#pragma once

#include "cpu/flash/decode_scores.h"
#include "cpu/flash/decode_values.h"
#include "cpu/flash/pack.h"

namespace fastattn::cpu {
namespace {

// E: engine of q . k and of the weights' sums; of the values E or F (see DecodeValues). S: dtype of q and
// out, K of k, W of v.
template <class E, class F, class S, class K, class W>
class Decode {
    using V = typename E::V;
    using Acc = typename E::Acc;
    static constexpr int w = V::width;
    static constexpr std::int64_t block = kDecodeBlock;

public:
    Decode(const FlashCall& call, const ItemRange& item, std::byte* workspace)
        : call_(call),
          p_(call.problem),
          item_(item),
          plan_(item_.entry->plan),
          x_(make_block<E>(p_, item_.batch, item_.entry->lengths)),
          rows_(item_.rows * item_.heads),
          keys_(start(workspace)),
          k_(p_.k, p_.head_dim, item_, reinterpret_cast<K*>(gathered(workspace)), selection_),
          v_(p_.v, p_.value_dim, item_,
             reinterpret_cast<W*>(gathered(workspace) + gathered_key_bytes(p_, plan_)), selection_),
          scores_(p_, item_, at_, k_),
          values_(x_, item_, at_, v_),
          one_row_(item_.rows == 1),
          pairs_(values_.pairs()) {
        clear_output(x_, 0, rows_);
        for (std::int64_t r = 0; r < rows_; ++r) {
            const RowInfo& row = x_.info[r];
            pack_row<E>(at_.q + r * plan_.q_stride,
                        row_pointer<const S>(p_.q, item_.batch, row.query, row.head), p_.q.dim, p_.head_dim);
        }
    }

    void run(std::byte* workspace) {
        pass(false);
        take_all_totals();
        if (!finite()) {
            // NaN or Inf in v (or in a score): again, leaving out the values that a row may not attend.
            start(workspace);
            clear_output(x_, 0, rows_);
            pass(true);
            take_all_totals();
        }
        values_.restore_columns();
        end_item<E, S>(call_, item_, x_);
    }

private:
    // The keys of the item: where it selects, numbers in the list that its rows share.
    KeyRange start(std::byte* workspace) {
        const KeyRange keys = start_item<E>(call_, item_, rows_, workspace, x_, at_);
        if (!plan_.selects) return keys;
        selection_ = Selection(x_.info[0]);
        const std::int64_t count = selection_.count();
        KeyRange own{item_.key_begin, item_.key_end < count ? item_.key_end : count};
        if (own.end < own.begin) own.begin = own.end = 0;
        for (std::int64_t r = 0; r < rows_; ++r) {
            x_.info[r].begin = own.begin;
            x_.info[r].end = own.end;
            x_.info[r].spans = {};
        }
        x_.listed = false;
        return own;
    }

    std::byte* gathered(std::byte* workspace) const {
        return workspace + flash_offsets(p_, plan_, tile_shape<E>()).gathered;
    }

    void pass(bool careful) {
        std::int64_t next_key = -1;  // with lists: no row sees a key before it
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            if (call_.executor.stop_requested()) return;
            const std::int64_t n = block_keys(j);
            if (x_.listed && next_key < j) {
                look_from(x_.info, rows_, j);
                next_key = next_seen(x_.info, rows_, j, keys_.end);
            }
            const bool hidden = x_.listed && next_key >= j + n;
            if (!hidden && !mask_hides(p_.mask, item_.batch, x_.info, rows_, j, n))
                attend_block(j, n, careful);
            if (plan_.section_keys > 0 && (j + block) % plan_.section_keys == 0) end_sections();
        }
    }

    void attend_block(std::int64_t j, std::int64_t n, bool careful) {
        const int vectors = static_cast<int>((n + w - 1) / w);
        k_.go_to(j, n, item_.heads);
        if (!one_row_ && !plan_.selects)
            next_ = keys_ahead(KeyRows<W>(p_.v, item_.batch, item_.kv_head), j, p_.value_dim, n, item_.heads);
        scores_.of_block(k_.first, n, next_);
        for (std::int64_t r = 0; r < rows_; ++r) {
            Acc* s = at_.scores + r * block;
            const V top = transform_row<E, 1>(x_, x_.info[r], s, j, vectors);
            follow_peak(x_, r, V::reduce_max(top), at_.p + r * block, 0, 0);
            store_weights(r, s, j, vectors);
        }
        if (!one_row_ && !plan_.selects) next_ = keys_after(j);
        v_.go_to(j, n, item_.heads);
        if (careful) {
            values_.add_block_carefully(v_.first, j, n);
        } else {
            values_.add_block(v_.first, n, next_);
        }
    }

    void end_sections() {
        for (std::int64_t r = 0; r < rows_; ++r) end_section(x_, r);
        clear_output(x_, 0, rows_);
    }

    void take_all_totals() {
        if (plan_.section_keys == 0) return;
        for (std::int64_t r = 0; r < rows_; ++r) {
            end_section(x_, r);
            take_totals(x_, r);
        }
    }

    std::int64_t block_keys(std::int64_t j) const { return keys_.end - j < block ? keys_.end - j : block; }

    // What is read after the present part of a block: the values of its keys, then the keys of the next
    // block. Prefetched row by row, in the order of the addresses, while the present part is computed.
    RowPrefetch<false> keys_after(std::int64_t j) const {
        j += block;
        const ItemRange* item = &item_;
        std::int64_t n = block_keys(j);
        ItemRange next_item;
        if (j >= keys_.end) {
            const std::int64_t next = call_.executor.next_item();
            if (next >= call_.schedule.items) return {};
            next_item = item_range(call_, next);
            item = &next_item;
            if (!next_item.entry->plan.decode || next_item.entry->plan.selects) return {};
            const KeyRange keys = entry_keys(p_, next_item.entry->lengths, 0);
            j = (keys.begin > next_item.key_begin ? keys.begin : next_item.key_begin) / block * block;
            n = next_item.key_end - j < block ? next_item.key_end - j : block;
        }
        return keys_ahead(KeyRows<K>(p_.k, item->batch, item->kv_head), j + keys_between(item_, *item),
                          p_.head_dim, n, item->heads);
    }

    // x (in s) of row r becomes weights, and its sums follow.
    void store_weights(std::int64_t r, Acc* s, std::int64_t j, int vectors) {
        const V shift = row_shift(x_, r);
        Acc* const sums = x_.row_sum + r * E::sums * w;
        Acc* const p = at_.p + r * block;
        for (int c = 0; c < vectors; c += E::nv) {
            V weights[E::nv];
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; ++n) {
                const V x = V::load(s + (c + n) * w) - shift;
                weights[n] = c + n >= vectors ? V::zero() : pairs_ ? exp2<E::accuracy>(x) : exp2(x);
            }
            // Before dropout: the denominator knows nothing of it.
            if (pairs_) {
                E::add_weights(weights, sums);
            } else {
                F::add_weights(weights, sums);
                if constexpr (E::sums > 1) F::add_weights(weights, sums + w);
            }
            if (p_.dropout > 0) [[unlikely]] {
#pragma GCC unroll 8
                for (int n = 0; n < E::nv; ++n) weights[n].store(s + (c + n) * w);
            } else {
                store_vectors(weights, p, c);
            }
        }
        if (p_.dropout > 0) [[unlikely]] {
            drop_weights(x_, x_.info[r], s, j, vectors * w);
            for (int c = 0; c < vectors; c += E::nv) {
                V weights[E::nv];
                for (int n = 0; n < E::nv; ++n) weights[n] = V::load(s + (c + n) * w);
                store_vectors(weights, p, c);
            }
        }
    }

    // Vectors of a row of weights from vector c on, as the product with v takes them.
    FASTATTN_INLINE void store_vectors(const V (&weights)[E::nv], Acc* p, int c) const {
#pragma GCC unroll 8
        for (int n = 0; n < E::nv; n += 2) {
            if (pairs_) {
                E::store_weights(weights[n], weights[n + 1], p, (c + n) * w);
            } else {
                F::store_weights(weights[n], weights[n + 1], p, (c + n) * w);
            }
        }
    }

    bool finite() const {
        V check = V::zero();
        for (std::int64_t r = 0; r < rows_; ++r) {
            check = V::fma(V::load(x_.row_sum + r * E::sums * w), V::zero(), check);
            for (std::int64_t c = 0; c < x_.o_stride; c += w) {
                check = V::fma(V::load(x_.o + r * x_.o_stride + c), V::zero(), check);
            }
        }
        return V::reduce_add(check) == 0;
    }

    const FlashCall& call_;
    const AttentionProblem& p_;
    ItemRange item_;
    const FlashPlan& plan_;
    FlashBlock<E> x_;
    ItemBuffers<E> at_{};
    const std::int64_t rows_;  // of all heads
    Selection selection_;
    const KeyRange keys_;
    DecodeKeys<K> k_;
    DecodeKeys<W> v_;
    const DecodeScores<E, K> scores_;
    const DecodeValues<E, F, W> values_;
    const bool one_row_;  // of each head
    const bool pairs_;  // keys two at a time in the product with v
    RowPrefetch<false> next_;
};

template <class E, class F, class S, class K, class W>
void decode_item(const FlashCall& call, const ItemRange& item, std::byte* workspace) {
    Decode<E, F, S, K, W>(call, item, workspace).run(workspace);
}

}  // namespace
}  // namespace fastattn::cpu
