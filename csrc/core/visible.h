// Which pairs of row and key attend, by lengths, causal, window and the bool mask: one rule for every kernel,
// for single rows and for blocks of them. What is asked of ranges serves devices, too.
#pragma once

#include <cstdint>
#include <cstring>

#include <fastattn/attention.h>

#include "core/host_device.h"

namespace fastattn {

struct Span {
    std::int64_t begin, end;
};

// The list of a row: intervals, ascending and disjoint, of keys less `shift`. Without a first one: all keys.
struct RowSpans {
    const Span* first = nullptr;
    std::int64_t count = 0, shift = 0;
    std::int64_t at = 0;  // where looking begins; any number of an interval
};

namespace {

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::int64_t saturating_add(std::int64_t a,
                                                                                std::int64_t b) noexcept {
    constexpr std::int64_t low = INT64_MIN, high = INT64_MAX;
    if (b > 0 && a > high - b) return high;
    if (b < 0 && a < low - b) return low;
    return a + b;
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::int64_t clamped(std::int64_t x, std::int64_t low,
                                                                         std::int64_t high) noexcept {
    return x < low ? low : (x > high ? high : x);
}

// Row i of a batch entry with `keys` valid keys, whose row 0 stands at `first_position`. Saturating, so any
// q_offset is safe: i is added last, i >= 0 and sizes are far below 2^63, so a sum that saturated before is
// still on the right side of [0, keys] after it.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline KeyRange attended_range(const AttentionProblem& p,
                                                                            std::int64_t keys,
                                                                            std::int64_t first_position,
                                                                            std::int64_t i) noexcept {
    KeyRange range;
    range.begin = 0;
    range.end = keys;
    if (p.window_left >= 0)
        range.begin = clamped(saturating_add(saturating_add(first_position, -p.window_left), i), 0, keys);
    if (p.causal || p.window_right >= 0) {
        const std::int64_t reach = p.causal ? 0 : p.window_right;  // causal is the tighter of the two
        const std::int64_t past = saturating_add(saturating_add(first_position, reach), 1);
        range.end = clamped(saturating_add(past, i), range.begin, keys);
    }
    return range;
}

// Of a row with the keys [begin, end): one key, all of n keys from j on.
template <class Int>
FASTATTN_HOST_DEVICE inline bool sees_key(Int begin, Int end, Int j) noexcept {
    return j >= begin && j < end;
}
template <class Int>
FASTATTN_HOST_DEVICE inline bool sees_all(Int begin, Int end, Int j, Int n) noexcept {
    return begin <= j && end >= j + n;
}

// The keys that any of neighbouring rows may attend: both ends rise with the row.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline KeyRange range_of_rows(const KeyRange& first,
                                                                           const KeyRange& last) noexcept {
    KeyRange range;
    range.begin = first.begin;
    range.end = last.end;
    return range;
}

enum class Seen { none, some, all };

// Which keys several rows may attend by their ranges: any of the rows, all of them.
struct RowsRange {
    std::int64_t begin, end, all_begin, all_end;
};

// Of no rows, among n keys.
inline RowsRange no_rows(std::int64_t n) noexcept { return {n, 0, 0, n}; }

inline void add_row(RowsRange& rows, std::int64_t begin, std::int64_t end) noexcept {
    if (end > begin) {
        rows.begin = begin < rows.begin ? begin : rows.begin;
        rows.end = end > rows.end ? end : rows.end;
    }
    rows.all_begin = begin > rows.all_begin ? begin : rows.all_begin;
    rows.all_end = end < rows.all_end ? end : rows.all_end;
}

// n keys from j on.
inline Seen seen_by(const RowsRange& rows, std::int64_t j, std::int64_t n) noexcept {
    if (rows.begin >= rows.end || rows.begin >= j + n || rows.end <= j) return Seen::none;
    return sees_all(rows.all_begin, rows.all_end, j, n) ? Seen::all : Seen::some;
}

// ---- lists of keys --------------------------------------------------------------------------------------
// The first interval that ends beyond key j.
inline std::int64_t span_after(const RowSpans& list, std::int64_t j) noexcept {
    const std::int64_t own = saturating_add(j, -list.shift);
    std::int64_t low = list.at, high = list.count;
    if (low > 0 && list.first[low - 1].end > own) low = 0;
    if (low < high && list.first[low].end > own) return low;
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (list.first[middle].end > own) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

inline bool in_list(const RowSpans& list, std::int64_t j) noexcept {
    const std::int64_t n = span_after(list, j);
    return n < list.count && list.first[n].begin <= saturating_add(j, -list.shift);
}

// Cuts a range down to the keys of a list, which is no list any more where they are one interval.
inline void cut_to_list(KeyRange& range, RowSpans& list) noexcept {
    const std::int64_t first = span_after(list, range.begin);
    std::int64_t low = first, high = list.count;  // the first interval that begins at range.end or beyond
    const std::int64_t end = saturating_add(range.end, -list.shift);
    while (low < high) {
        const std::int64_t middle = low + (high - low) / 2;
        if (list.first[middle].begin >= end) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    if (low == first) {
        range.end = range.begin;
        list = {};
        return;
    }
    const std::int64_t from = saturating_add(list.first[first].begin, list.shift),
                       to = saturating_add(list.first[low - 1].end, list.shift);
    range.begin = from > range.begin ? from : range.begin;
    range.end = to < range.end ? to : range.end;
    if (low - first == 1) {
        list = {};
    } else {
        list.first += first;
        list.count = low - first;
    }
}

// Row: has begin, end and spans. n keys from j on, of one row.
template <class Row>
Seen seen_by_row(const Row& row, std::int64_t j, std::int64_t n) noexcept {
    if (row.begin >= j + n || row.end <= j) return Seen::none;
    const bool whole = sees_all(row.begin, row.end, j, n);
    if (row.spans.first == nullptr) return whole ? Seen::all : Seen::some;
    const std::int64_t at = span_after(row.spans, j), own = j - row.spans.shift;
    if (at == row.spans.count || row.spans.first[at].begin >= own + n) return Seen::none;
    const Span& span = row.spans.first[at];
    return whole && span.begin <= own && span.end >= own + n ? Seen::all : Seen::some;
}

// Whether two rows have the same keys, as far as that costs nothing to see.
template <class Row>
bool see_alike(const Row& a, const Row& b) noexcept {
    return a.begin == b.begin && a.end == b.end && a.spans.first == b.spans.first &&
           a.spans.count == b.spans.count && a.spans.shift == b.spans.shift;
}

// The same of several rows.
template <class Row>
Seen seen_by_rows(const Row* rows, std::int64_t count, std::int64_t j, std::int64_t n) noexcept {
    bool any = false, all = true;
    for (std::int64_t r = 0; r < count; ++r) {
        if (r > 0 && see_alike(rows[r], rows[r - 1])) continue;
        const Seen seen = seen_by_row(rows[r], j, n);
        any = any || seen != Seen::none;
        all = all && seen == Seen::all;
        if (any && !all) return Seen::some;
    }
    return any ? Seen::all : Seen::none;
}

// Keys of a block, less those at either end that none of some rows sees; empty: none of them.
struct SeenKeys {
    std::int64_t begin, end;
    bool all;  // by all of the rows, each of them
};

// Of the keys [j, j + n).
template <class Row>
SeenKeys seen_within(const Row* rows, std::int64_t count, std::int64_t j, std::int64_t n) noexcept {
    SeenKeys seen{j + n, j, true};
    for (std::int64_t r = 0; r < count; ++r) {
        const Row& row = rows[r];
        if (r > 0 && see_alike(row, rows[r - 1])) continue;
        std::int64_t from = row.begin > j ? row.begin : j, to = row.end < j + n ? row.end : j + n;
        if (from < to && row.spans.first != nullptr) {
            std::int64_t at = span_after(row.spans, from);
            const std::int64_t shift = row.spans.shift;
            if (at < row.spans.count && row.spans.first[at].begin + shift < to) {
                const std::int64_t begin = row.spans.first[at].begin + shift;
                from = begin > from ? begin : from;
                for (; at + 1 < row.spans.count && row.spans.first[at + 1].begin + shift < to; ++at)
                    seen.all = false;
                const std::int64_t end = row.spans.first[at].end + shift;
                to = end < to ? end : to;
            } else {
                to = from;
            }
        }
        if (from >= to) {
            seen.all = false;
            continue;
        }
        if (r > 0 && (from != seen.begin || to != seen.end)) seen.all = false;
        seen.begin = from < seen.begin ? from : seen.begin;
        seen.end = to > seen.end ? to : seen.end;
    }
    return seen;
}

// Looking in lists begins at key j from now on.
template <class Row>
void look_from(Row* rows, std::int64_t count, std::int64_t j) noexcept {
    for (std::int64_t r = 0; r < count; ++r) {
        if (rows[r].spans.first == nullptr) continue;
        const std::int64_t at =
            r > 0 && see_alike(rows[r], rows[r - 1]) ? rows[r - 1].spans.at : span_after(rows[r].spans, j);
        rows[r].spans.at = at < rows[r].spans.count ? at : rows[r].spans.count - 1;
    }
}

// The first key from j on that any of the rows may attend; `end` or beyond: none before it.
template <class Row>
std::int64_t next_seen(const Row* rows, std::int64_t count, std::int64_t j, std::int64_t end) noexcept {
    for (std::int64_t r = 0; r < count && end > j; ++r) {
        const Row& row = rows[r];
        if ((r > 0 && see_alike(row, rows[r - 1])) || row.end <= j) continue;
        std::int64_t next = row.begin > j ? row.begin : j;
        if (row.spans.first != nullptr) {
            const std::int64_t at = span_after(row.spans, next);
            if (at == row.spans.count) continue;
            const std::int64_t begin = row.spans.first[at].begin + row.spans.shift;
            next = begin > next ? begin : next;
            if (next >= row.end) continue;
        }
        end = next < end ? next : end;
    }
    return end;
}

// Whether any of n mask bytes from (b, head, query, j) on is set.
inline bool mask_any(const ScoreOperand& mask, std::int64_t b, std::int64_t head, std::int64_t query,
                     std::int64_t j, std::int64_t n) noexcept {
    const auto* p = static_cast<const std::uint8_t*>(mask.data) + b * mask.batch + head * mask.head +
                    query * mask.query + j * mask.key;
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

// Whether the bool mask leaves none of `count` rows any of n keys from j on. Row: has a query and a head.
template <class Row>
bool mask_hides(const ScoreOperand& mask, std::int64_t b, const Row* rows, std::int64_t count, std::int64_t j,
                std::int64_t n) noexcept {
    if (mask.data == nullptr) return false;
    const bool alike = mask.query == 0 && mask.head == 0;
    for (std::int64_t r = 0; r < (alike ? 1 : count); ++r) {
        // Neighbours may have the same row of the mask.
        if (r > 0 && (mask.query == 0 || rows[r].query == rows[r - 1].query) &&
            (mask.head == 0 || rows[r].head == rows[r - 1].head))
            continue;
        if (mask_any(mask, b, rows[r].head, rows[r].query, j, n)) return false;
    }
    return true;
}

}  // namespace
}  // namespace fastattn
