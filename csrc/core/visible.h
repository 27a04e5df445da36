// The keys of a row by lengths, causal and window: one rule for every kernel on every device.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

#include "core/host_device.h"

namespace fastattn {
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
// q_offset is safe: i is added last, i >= 0 and sizes are far below 2^63, so a sum that saturated before is still
// on the right side of [0, keys] after it.
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

}  // namespace
}  // namespace fastattn
