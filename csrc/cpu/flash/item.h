// What prefill and decode items have in common: which rows and keys an item has, and its end.
#pragma once

#include <fastattn/attention.h>

#include "core/entry.h"
#include "core/keys.h"
#include "cpu/flash/call.h"
#include "cpu/flash/output.h"

namespace fastattn::cpu {
namespace {

template <class E>
constexpr TileShape tile_shape() {
    return {E::mr, E::nr, E::V::width, E::scalars, E::sums, sizeof(typename E::Unit)};
}

struct ItemRange {
    const FlashEntry* entry;
    std::byte* partials;  // of the entry
    std::int64_t batch, kv_head, heads, split;  // kv heads [kv_head, kv_head + heads)
    std::int64_t row_begin, rows;   // rows of each (batch, kv head): row r is query r / G, head r % G
    std::int64_t key_begin, key_end;
};

// The order of an entry's items: later row blocks first, since under a causal mask they are the longest.
inline ItemRange item_range(const FlashCall& call, std::int64_t number) {
    const Place<FlashEntry> place = place_of(call.schedule.entries, &FlashEntry::items, number);
    const FlashPlan& plan = place.entry->plan;
    std::int64_t item = place.item;
    ItemRange x{};
    x.entry = place.entry;
    x.partials = call.shared + place.shared;
    x.batch = place.batch;
    x.row_begin = (plan.row_items - 1 - item % plan.row_items) * plan.rows_per_item;
    item /= plan.row_items;
    x.split = item % plan.key_splits;
    x.kv_head = item / plan.key_splits * plan.heads_per_item;
    const std::int64_t heads_left = call.problem.kv_heads - x.kv_head;
    x.heads = heads_left < plan.heads_per_item ? heads_left : plan.heads_per_item;
    const std::int64_t left = plan.rows - x.row_begin;
    x.rows = left < plan.rows_per_item ? left : plan.rows_per_item;
    x.key_begin = x.split * plan.split_keys;
    const std::int64_t end = x.key_begin + plan.split_keys, keys = place.entry->lengths.kv_len;
    x.key_end = end < keys ? end : keys;  // with `selects` the list may end before it
    return x;
}

// How far the rows and keys of another item's entry are from this one's, where entries are packed: addresses
// count from the latter's first (core/entry_view.h).
inline std::int64_t rows_between(const ItemRange& mine, const ItemRange& other) {
    return other.entry->lengths.first_row - mine.entry->lengths.first_row;
}
inline std::int64_t keys_between(const ItemRange& mine, const ItemRange& other) {
    return other.entry->lengths.first_key - mine.entry->lengths.first_key;
}

// A row of an entry, with the keys that it may attend.
FASTATTN_INLINE RowInfo row_info(const AttentionProblem& p, const Entry& entry, std::int64_t query,
                                 std::int64_t head) {
    RowInfo row{};
    row.query = query;
    row.head = head;
    if (query < entry.q_len) {
        const KeyRange range = row_keys(p, entry, head, query, row.spans);
        row.begin = range.begin;
        row.end = range.end;
    }
    return row;
}

// Asks for n rows of a tensor ahead of their use, a share at a time between other work: rows of one head are
// often a page apart, which no hardware prefetcher follows. With several heads: all heads of a row, then the
// next row.
template <bool for_writing>
class RowPrefetch {
public:
    RowPrefetch() = default;
    RowPrefetch(const void* first, std::int64_t row_bytes, std::int64_t stride_bytes, std::int64_t n,
                std::int64_t heads = 1, std::int64_t head_bytes = 0)
        : row_(static_cast<const char*>(first)),
          row_bytes_(row_bytes),
          stride_(stride_bytes),
          left_(n),
          heads_(heads),
          head_stride_(head_bytes) {}

    FASTATTN_INLINE void advance(std::int64_t rows) {
        for (; rows > 0 && left_ > 0; --rows) {
            const char* at = row_ + head_ * head_stride_;
            const char* line = at - reinterpret_cast<std::uintptr_t>(at) % kLineBytes;
            for (const char* end = at + row_bytes_; line < end; line += kLineBytes)
                fetch_line<for_writing>(line);
            if (++head_ < heads_) continue;
            head_ = 0;
            row_ += stride_;
            --left_;
        }
    }

private:
    const char* row_ = nullptr;
    std::int64_t row_bytes_ = 0, stride_ = 0, left_ = 0, heads_ = 1, head_stride_ = 0, head_ = 0;
};

// n rows of a tensor from row i of head h on, of `heads` heads. Nothing where a row's numbers lie apart.
template <class S, bool for_writing>
RowPrefetch<for_writing> rows_ahead(const Operand& x, std::int64_t b, std::int64_t i, std::int64_t h,
                                    std::int64_t dim, std::int64_t n, std::int64_t heads = 1) {
    constexpr auto size = static_cast<std::int64_t>(sizeof(S));
    if (x.dim != 1 || n <= 0) return {};
    return {row_pointer<const S>(x, b, i, h), dim * size, x.seq * size, n, heads, x.head * size};
}

// n keys or values from key j on, of `heads` heads.
template <class T>
RowPrefetch<false> keys_ahead(const KeyRows<T>& rows, std::int64_t j, std::int64_t dim, std::int64_t n,
                              std::int64_t heads = 1) {
    constexpr auto size = static_cast<std::int64_t>(sizeof(T));
    if (rows.number_stride() != 1 || n <= 0) return {};
    const KeyRun<T> run = rows.run(j, n);
    return {run.first, dim * size, run.key * size, run.count, heads, run.head * size};
}

// The buffers of an item, from the thread's workspace; sums are cleared.
template <class E>
struct ItemBuffers {
    using Unit = typename E::Unit;
    using Acc = typename E::Acc;
    Unit *q, *k, *v, *p;
    Acc* scores;
    std::uint8_t* bad;
    TileKeys* tiles;
};

// Fills block and buffers for the rows of an item, one head after the other; in prefill up to padded_rows
// by repeating the last one. O is left as it is. Returns the keys that any of the rows may attend.
template <class E>
KeyRange start_item(const FlashCall& call, const ItemRange& item, std::int64_t padded_rows,
                    std::byte* workspace, FlashBlock<E>& x, ItemBuffers<E>& buffers) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    const FlashPlan& plan = item.entry->plan;
    const FlashOffsets at = flash_offsets(call.problem, plan, tile_shape<E>());
    auto units = [&](std::size_t offset) { return reinterpret_cast<typename E::Unit*>(workspace + offset); };
    auto accs = [&](std::size_t offset) { return reinterpret_cast<Acc*>(workspace + offset); };
    buffers = {units(at.q),
               units(at.k),
               units(at.v),
               units(at.p),
               accs(at.scores),
               reinterpret_cast<std::uint8_t*>(workspace + at.bad),
               reinterpret_cast<TileKeys*>(workspace + at.tiles)};
    x.o_stride = plan.o_stride;
    x.info = reinterpret_cast<RowInfo*>(workspace + at.info);
    x.row_max = accs(at.row_max);
    x.row_shift = accs(at.row_shift);
    x.row_sum = accs(at.row_sum);
    x.o = accs(at.o);
    if (plan.section_keys > 0) {
        const std::int64_t size = padded_rows * (x.o_stride + E::sums);
        x.o_total = reinterpret_cast<double*>(workspace + at.totals);
        x.sum_total = x.o_total + padded_rows * x.o_stride;
        for (std::int64_t n = 0; n < size; ++n) x.o_total[n] = 0;
    }
    const std::int64_t group = call.problem.group, rows = item.rows * item.heads;
    KeyRange keys{item.key_end, item.key_begin};
    for (std::int64_t h = 0, r = 0; h < item.heads; ++h) {
        const std::int64_t first_head = (item.kv_head + h) * group;
        std::int64_t query = item.row_begin / group, member = item.row_begin % group;
        for (std::int64_t end = r + item.rows; r < end; ++r) {
            RowInfo info = row_info(call.problem, x.entry, query, first_head + member);
            if (++member == group) {
                member = 0;
                ++query;
            }
            if (!plan.selects && info.begin < item.key_begin) info.begin = item.key_begin;
            if (!plan.selects && info.end > item.key_end) info.end = item.key_end;
            if (info.end <= info.begin) info.begin = info.end = item.key_begin;
            x.listed = x.listed || info.spans.first != nullptr;
            if (x.elementwise) find_features(x, info);
            x.info[r] = info;
            if (info.end > info.begin) {
                if (info.begin < keys.begin) keys.begin = info.begin;
                if (info.end > keys.end) keys.end = info.end;
            }
        }
    }
    for (std::int64_t r = rows; r < padded_rows; ++r) x.info[r] = x.info[r - 1];
    for (std::int64_t r = 0; r < padded_rows; ++r) {
        x.row_max[r] = -kInf<Acc>;
        x.row_shift[r] = 0;
    }
    for (std::int64_t r = 0; r < padded_rows * E::sums; ++r) V::zero().store(x.row_sum + r * V::width);
    return keys;
}

template <class E>
void clear_output(const FlashBlock<E>& x, std::int64_t first, std::int64_t rows) {
    using V = typename E::V;
    auto* o = x.o + first * x.o_stride;
    for (std::int64_t c = 0; c < rows * x.o_stride; c += V::width) V::zero().store(o + c);
}

template <class E>
typename E::Acc* partial_of(const FlashPlan& plan, std::byte* partials, std::int64_t kv_head,
                            std::int64_t row, std::int64_t split) {
    return reinterpret_cast<typename E::Acc*>(partials) +
           ((kv_head * plan.rows + row) * plan.key_splits + split) * plan.partial_stride;
}

// Writes the rows of an item: their outputs, or partial results where the keys are split.
template <class E, class S>
void end_item(const FlashCall& call, const ItemRange& item, FlashBlock<E>& x) {
    // Some rows at a time: a row that sees nothing may look at its whole mask before the next question
    // whether to stop.
    constexpr int kRows = 16;
    const std::int64_t rows = item.rows * item.heads;
    for (std::int64_t first = 0; first < rows; first += kRows) {
        if (call.executor.stop_requested()) return;
        const std::int64_t end = rows - first < kRows ? rows : first + kRows;
        if (item.entry->plan.key_splits > 1) {
            for (std::int64_t r = first; r < end; ++r)
                write_partial(x, r,
                              partial_of<E>(item.entry->plan, item.partials, item.kv_head + r / item.rows,
                                            item.row_begin + r % item.rows, item.split));
            continue;
        }
        // All sums before the outputs: a row's sum and divisions take long, and do not wait for each other.
        double factors[kRows];
        for (std::int64_t r = first; r < end; ++r) {
            const double l = total_weight(x, r, false),
                         rounded_l = E::sums > 1 ? total_weight(x, r, true) : l;
            const RowFactors found = finish_sums(x, x.info[r], double(x.row_max[r]), l, rounded_l);
            factors[r - first] = found.output;
            // For the weights, on request.
            x.row_sum[r * E::sums * E::V::width] = static_cast<typename E::Acc>(found.weight);
        }
        for (std::int64_t r = first; r < end; ++r)
            write_output<E, S>(x, x.info[r], factors[r - first], x.o + r * x.o_stride);
    }
}

template <class E, class S>
void flash_merge(const FlashCall& call, std::int64_t item) {
    const Place<FlashEntry> place = place_of(call.schedule.entries, &FlashEntry::merges, item);
    const FlashPlan& plan = place.entry->plan;
    const Entry& entry = place.entry->lengths;
    const std::int64_t kv_head = place.item / plan.rows, row = place.item % plan.rows,
                       group = call.problem.group;
    FlashBlock<E> x = make_block<E>(call.problem, place.batch, entry);
    x.o_stride = plan.o_stride;
    merge_row<E, S>(x, row_info(call.problem, entry, row / group, kv_head * group + row % group),
                    partial_of<E>(plan, call.shared + place.shared, kv_head, row, 0), plan.key_splits,
                    plan.partial_stride);
}

}  // namespace
}  // namespace fastattn::cpu
