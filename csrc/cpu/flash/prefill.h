// Prefill: many query rows. For each block of keys (kKeyBlock, or half of that), k and v are packed once for
// all rows of the item; then each tile of mr rows (the last one may have fewer) is computed against it: see
// prefill_tile.h.
//
//   q (rows, Du)   k (panels, Du, nr)   p (mr, key_block)   v (panels, key_block, nr)   O (rows, Dv)
#pragma once

#include "cpu/flash/pack.h"
#include "cpu/flash/prefill_tile.h"
#include "cpu/flash/prefill_weights.h"

namespace fastattn::cpu {
namespace {

// S: dtype of q and out, K of k, W of v.
template <class E, class S, class K, class W>
class Prefill {
    using V = typename E::V;
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    static constexpr int w = V::width;
    static constexpr int kRowStep = 2;  // the last tile of an item may have fewer rows, a multiple of this
    static_assert(E::mr % kRowStep == 0);
    static constexpr std::int64_t kInCaches = 256 * 1024;  // bytes of k and v that need no prefetching

public:
    Prefill(const FlashCall& call, const ItemRange& item, std::byte* workspace)
        : call_(call),
          p_(call.problem),
          item_(item),
          plan_(item_.entry->plan),
          x_(make_block<E>(p_, item_.batch, item_.entry->lengths)),
          k_(p_.k, item_.batch, item_.kv_head),
          v_(p_.v, item_.batch, item_.kv_head),
          padded_((item_.rows + kRowStep - 1) / kRowStep * kRowStep),
          keys_(start_item<E>(call, item_, padded_, workspace, x_, at_)),
          tile_(plan_, x_, at_, padded_) {
        d_units_ = (p_.head_dim + E::scalars - 1) / E::scalars;
        const std::int64_t key_bytes = p_.head_dim * static_cast<std::int64_t>(sizeof(K)) +
                                       p_.value_dim * static_cast<std::int64_t>(sizeof(W));
        large_ = p_.batch * p_.kv_heads * p_.kv_size * key_bytes > kInCaches;
    }

    void run() {
        pack_queries();
        find_tile_keys();
        const std::int64_t block = plan_.key_block;
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            if (call_.executor.stop_requested()) return;
            const std::int64_t n = block_keys(j);
            const bool hidden = x_.listed && next_ >= j + n;
            if (!hidden && !mask_hides(p_.mask, item_.batch, x_.info, item_.rows, j, n)) attend_block(j, n);
            if (call_.executor.stop_requested()) return;
            if (section_ends(j)) end_sections();
        }
        for (std::int64_t r = 0; r < padded_; r += E::mr) {
            if (!tile_of(r).started) clear_output(x_, r, E::mr);
        }
        if (plan_.section_keys > 0) {
            for (std::int64_t r = 0; r < padded_; ++r) {
                end_section(x_, r);
                take_totals(x_, r);
            }
        }
        end_item<E, S>(call_, item_, x_);
        if (p_.weights.data != nullptr)
            PrefillWeights<E, K>(plan_, x_, at_, tile_, k_, item_.rows, call_.executor).write(keys_);
    }

private:
    void attend_block(std::int64_t j, std::int64_t n) {
        pack_block(j, n);
        next_ = keys_.end;
        if (large_) plan_prefetch(j + plan_.key_block);
        for (std::int64_t r = 0; r < padded_; r += E::mr) {
            if (x_.listed && tile_of(r).next >= j + n) {
                if (tile_of(r).next < next_) next_ = tile_of(r).next;
                continue;
            }
            if (call_.executor.stop_requested()) return;
            if (large_) {
                next_k_.advance(prefetch_rows_);
                next_v_.advance(prefetch_rows_);
                next_q_.advance(prefetch_rows_);
                out_.advance(prefetch_rows_);
            }
            const std::int64_t rows = padded_ - r < E::mr ? padded_ - r : E::mr;
            with_count<E::mr / kRowStep>(static_cast<int>(rows / kRowStep), [&](auto count) {
                constexpr int mr = decltype(count)::value * kRowStep;
                const TileColumns columns = tile_.template attend<mr>(r, j, n);
                if (has_bad_) add_bad_values(r, mr, j, columns);
                if (x_.listed) find_next<mr>(r, j + n);
            });
        }
    }

    // During the tiles of one block the keys and values of the next one, from key j on, are on their way;
    // during those of the last one what this thread will probably compute next.
    void plan_prefetch(std::int64_t j) {
        next_q_ = next_k_ = next_v_ = {};
        out_ = {};
        ItemRange item = item_;
        std::int64_t n = j < keys_.end ? block_keys(j) : 0;
        const std::int64_t tiles = (padded_ + E::mr - 1) / E::mr;
        if (n == 0) {
            // With split keys the output is written by the merge.
            if (plan_.key_splits == 1 && p_.out_dtype == p_.dtype)
                out_ = query_rows_ahead<true>(p_.out, item_, p_.value_dim);
            prefetch_rows_ = (item_.rows + tiles - 1) / tiles;
            const std::int64_t next = call_.executor.next_item();
            if (next >= call_.schedule.items) return;
            item = item_range(call_, next);
            if (item.entry->plan.decode) return;
            KeyRange keys = entry_keys(p_, item.entry->lengths, item.row_begin / p_.group);
            if (keys.begin < item.key_begin) keys.begin = item.key_begin;
            if (keys.end > item.key_end) keys.end = item.key_end;
            const std::int64_t block = item.entry->plan.key_block;
            j = keys.begin / block * block;
            n = keys.end - j < block ? keys.end - j : block;
            next_q_ = query_rows_ahead<false>(p_.q, item, p_.head_dim);
        }
        j += keys_between(item_, item);
        next_k_ = keys_ahead(KeyRows<K>(p_.k, item.batch, item.kv_head), j, p_.head_dim, n);
        next_v_ = keys_ahead(KeyRows<W>(p_.v, item.batch, item.kv_head), j, p_.value_dim, n);
        prefetch_rows_ = ((n < item.rows ? item.rows : n) + tiles - 1) / tiles;
    }

    // Sections end at the same keys whatever the item's first one is.
    bool section_ends(std::int64_t j) const {
        const std::int64_t section = plan_.section_keys;
        return section > 0 && (j + plan_.key_block) % section == 0;
    }

    void end_sections() {
        for (std::int64_t r = 0; r < padded_; ++r) {
            TileKeys& tile = tile_of(r);
            if (!tile.started) continue;
            end_section(x_, r);
            if (r % E::mr == E::mr - 1 || r == padded_ - 1) tile.started = false;
        }
    }

    // The rows of q or out of an item. Of a group where the heads of a query lie side by side: else each head
    // is a stream that the hardware follows.
    template <bool for_writing>
    RowPrefetch<for_writing> query_rows_ahead(const Operand& x, const ItemRange& item,
                                              std::int64_t dim) const {
        if (p_.group > 1 && !heads_side_by_side(x)) return {};
        return rows_ahead<S, for_writing>(
            x, item.batch, item.row_begin / p_.group + rows_between(item_, item), item.kv_head * p_.group,
            dim, (item.rows + p_.group - 1) / p_.group, p_.group);
    }

    // Keys [j, j + n), less the panels before the first that anybody attends.
    void pack_block(std::int64_t j, std::int64_t n) {
        const std::int64_t skip = keys_.begin > j ? (keys_.begin - j) / E::nr * E::nr : 0, left = n - skip;
        pack_keys<E>(at_.k + skip * d_units_, KeyPointers<K, kKeyBlock>(k_, j + skip, left), left,
                     p_.head_dim);
        const std::int64_t padded = (n + E::nr - 1) / E::nr * E::nr;
        tile_.set_value_units(padded / E::scalars);
        has_bad_ = pack_values<E>(at_.v + skip / E::scalars * E::nr, at_.bad + skip,
                                  KeyPointers<W, kKeyBlock>(v_, j + skip, left), left, (left + w - 1) / w * w,
                                  padded, p_.value_dim);
    }

    void pack_queries() {
        // The weights on request are computed by whole tiles.
        const std::int64_t rows =
            p_.weights.data == nullptr ? padded_ : (padded_ + E::mr - 1) / E::mr * E::mr;
        for (std::int64_t r = 0; r < rows; ++r) {
            const RowInfo& row = x_.info[r < padded_ ? r : padded_ - 1];
            pack_row<E>(at_.q + r * plan_.q_stride,
                        row_pointer<const S>(p_.q, item_.batch, row.query, row.head), p_.q.dim, p_.head_dim);
        }
    }

    std::int64_t block_keys(std::int64_t j) const {
        const std::int64_t left = keys_.end - j;
        return left < plan_.key_block ? left : plan_.key_block;
    }

    TileKeys& tile_of(std::int64_t r) { return at_.tiles[r / E::mr]; }

    // Where the tile, and so the item, goes on after key j.
    template <int rows>
    void find_next(std::int64_t r, std::int64_t j) {
        TileKeys& tile = tile_of(r);
        if (tile.next < j) {
            look_from(x_.info + r, rows, j);
            tile.next = next_seen(x_.info + r, rows, j, keys_.end);
        }
        if (tile.next < next_) next_ = tile.next;
    }

    // The keys of each tile of rows, once for all blocks.
    void find_tile_keys() {
        for (std::int64_t r = 0; r < padded_; ++r) {
            TileKeys& tile = tile_of(r);
            if (r % E::mr == 0) tile = {no_rows(x_.entry.kv_len), 0, false, false};
            tile.listed = tile.listed || x_.info[r].spans.first != nullptr;
            add_row(tile.range, x_.info[r].begin, x_.info[r].end);
        }
    }

    // The NaN and Inf that pack_values took out, for the rows that attend them.
    void add_bad_values(std::int64_t r, int rows, std::int64_t j, TileColumns columns) {
        for (std::int64_t c = columns.first; c < columns.last; ++c) {
            if (!at_.bad[c]) continue;
            for (int m = 0; m < rows; ++m) {
                if (!attends(x_, x_.info[r + m], j + c)) continue;
                const Acc weight = E::weight(tile_.weights_row(m), c);
                const W* v = v_[j + c];
                for (std::int64_t d = 0; d < p_.value_dim; ++d) {
                    const Acc value = to_scalar(v[d * v_.number_stride()]);
                    if (!(value - value == 0)) x_.o[(r + m) * x_.o_stride + d] += weight * value;
                }
            }
        }
    }

    const FlashCall& call_;
    const AttentionProblem& p_;
    ItemRange item_;
    const FlashPlan& plan_;
    FlashBlock<E> x_;
    const KeyRows<K> k_;
    const KeyRows<W> v_;
    ItemBuffers<E> at_{};
    const std::int64_t padded_;
    const KeyRange keys_;
    PrefillTile<E> tile_;
    std::int64_t d_units_ = 0;
    bool has_bad_ = false, large_ = false;
    RowPrefetch<false> next_q_, next_k_, next_v_;
    RowPrefetch<true> out_;
    std::int64_t prefetch_rows_ = 0;
    std::int64_t next_ = 0;  // with lists: no row sees a key before it
};

template <class E, class S, class K, class W>
void prefill_item(const FlashCall& call, const ItemRange& item, std::byte* workspace) {
    Prefill<E, S, K, W>(call, item, workspace).run();
}

}  // namespace
}  // namespace fastattn::cpu
