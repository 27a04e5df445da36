// One entry of a call: what lengths and offsets say of it.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/visible.h"

namespace fastattn {

struct Entry {
    std::int64_t q_len = 0, kv_len = 0;
    std::int64_t offset = 0;  // the position of row 0
};

namespace {

// The keys that row i may attend by kv_len, causal and window.
inline KeyRange entry_keys(const AttentionProblem& p, const Entry& entry, std::int64_t i) noexcept {
    return attended_range(p, entry.kv_len, entry.offset, i);
}

}  // namespace
}  // namespace fastattn
