// One entry of a call: what lengths and offsets say of it.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/visible.h"

namespace fastattn {

// Which list of keys each row of an entry has, where the mask has lists (core/mask_lists.h).
struct RowLists {
    const std::int64_t* index = nullptr;  // null: no lists
    std::int64_t head = 0, row = 0;  // strides
    std::int64_t heads = 1, rows = 1;  // of q, that have one list
    std::int64_t first_row = 0;
    const std::int64_t* starts = nullptr;
    const Span* spans = nullptr;
    std::int64_t shift = 0;
};

struct Entry {
    std::int64_t q_len = 0, kv_len = 0;
    std::int64_t offset = 0;  // the position of row 0
    // Rows and keys of the arrays that are the entry's, padding too, and the first of them: 0 in a padded
    // batch.
    std::int64_t q_size = 0, kv_size = 0;
    std::int64_t first_row = 0, first_key = 0;
    RowLists lists{};
};

namespace {

// Where row i of query head h has its place among all rows of a call: entry after entry, head after head.
inline std::int64_t row_number(const AttentionProblem& p, std::int64_t b, const Entry& entry, std::int64_t h,
                               std::int64_t i) noexcept {
    const std::int64_t before = p.packed() ? entry.first_row : b * entry.q_size;
    return before * p.q_heads + h * entry.q_size + i;
}

// The keys that row i may attend by kv_len, causal and window.
inline KeyRange entry_keys(const AttentionProblem& p, const Entry& entry, std::int64_t i) noexcept {
    return attended_range(p, entry.kv_len, entry.offset, i);
}

inline RowSpans list_of(const RowLists& lists, std::int64_t h, std::int64_t i) noexcept {
    const std::int64_t n =
        lists.index[h / lists.heads * lists.head + (lists.first_row + i) / lists.rows * lists.row];
    return {lists.spans + lists.starts[n], lists.starts[n + 1] - lists.starts[n], lists.shift};
}

// The keys of row i of query head h by lists, too; i < q_len. `list` is what the range does not say.
inline KeyRange row_keys(const AttentionProblem& p, const Entry& entry, std::int64_t h, std::int64_t i,
                         RowSpans& list) noexcept {
    KeyRange range = entry_keys(p, entry, i);
    if (entry.lists.index != nullptr) {
        list = list_of(entry.lists, h, i);
        cut_to_list(range, list);
    }
    return range;
}

}  // namespace
}  // namespace fastattn
