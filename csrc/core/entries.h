// The entries of a call, read once: another thread may write to lengths and offsets meanwhile, and run() goes
// by what plan() has read.
#pragma once

#include <cstdint>
#include <vector>

#include "core/entry.h"
#include "core/mask_lists.h"

namespace fastattn {

// Whether nothing tells the entries of the batch apart.
inline bool entries_alike(const AttentionProblem& p) {
    const bool by_lengths = p.packed() || p.has_q_lens || p.has_kv_lens || p.q_offsets.data != nullptr;
    return p.batch <= 1 || (!by_lengths && conditions_alike(p));
}

inline Entry read_entry(const AttentionProblem& p, std::int64_t b) {
    const KeyRange rows = p.rows_of(b), keys = p.keys_of(b);
    Entry entry;
    entry.q_size = rows.end - rows.begin;
    entry.kv_size = keys.end - keys.begin;
    entry.first_row = rows.begin;
    entry.first_key = keys.begin;
    entry.q_len = p.q_len_among(b, entry.q_size);
    entry.kv_len = p.kv_len_among(b, entry.kv_size);
    entry.offset = p.has_q_offset ? p.offset(b) : entry.kv_len - entry.q_len;
    return entry;
}

// f(b, entry) for each entry that the problem tells apart: once with b = 0 where they are alike. `lists`
// keeps what the entries point to.
template <class F>
void for_each_entry(const AttentionProblem& p, MaskLists& lists, F&& f) {
    if (p.batch == 0) return f(0, Entry{p.q_size, p.kv_size, 0, p.q_size, p.kv_size, 0, 0, {}});
    const std::int64_t count = entries_alike(p) ? 1 : p.batch;
    std::int64_t row = 0, key = 0;  // the first ones that no packed entry had so far
    for (std::int64_t b = 0; b < count; ++b) {
        Entry entry = read_entry(p, b);
        // Bounds that somebody wrote to between two of them: no two entries may write to the same place.
        if (p.packed() && (entry.first_row < row || (entry.first_key < key && !p.paged()))) entry = {};
        if (p.packed()) {
            row = entry.first_row + entry.q_size;
            key = entry.first_key + entry.kv_size;
        }
        entry.lists = lists.of(p, b, entry);
        f(b, entry);
    }
}

}  // namespace fastattn
