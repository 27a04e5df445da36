// One entry of a call: what lengths and offsets say of it.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/visible.h"

namespace fastattn {

struct Entry {
    std::int64_t q_len = 0, kv_len = 0;
    std::int64_t offset = 0;  // the position of row 0
    // Rows and keys of the arrays that are the entry's, padding too, and the first of them: 0 in a padded
    // batch.
    std::int64_t q_size = 0, kv_size = 0;
    std::int64_t first_row = 0, first_key = 0;
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

}  // namespace
}  // namespace fastattn
