// Which axes of (B, Hq, Sq, Sk) an array has of its own: the others are those that it broadcasts.
#pragma once

#include <cstdint>

#include <fastattn/attention.h>

namespace fastattn {
namespace {

struct AxisSizes {
    std::int64_t batch, head, query, key;
    std::int64_t count() const { return batch * head * query * key; }
};

// 1 where the stride is 0; nothing for an array that is not given.
[[maybe_unused]] static inline AxisSizes own_sizes(const ScoreOperand& x, const AttentionProblem& p) {
    if (x.data == nullptr) return {0, 0, 0, 0};
    const auto own = [](std::int64_t stride, std::int64_t size) { return stride == 0 ? 1 : size; };
    return {own(x.batch, p.batch), own(x.head, p.q_heads), own(x.query, p.q_size), own(x.key, p.kv_size)};
}

}  // namespace
}  // namespace fastattn
