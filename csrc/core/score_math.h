// What is done to scale * q.k before biases: the one place for its definition, its slope and its limits, for
// CPU, CUDA and reference. Today that is the softcap, c tanh(s / c). Kernels have their vector forms of it
// beside them.
#pragma once

#include <cmath>

#include <fastattn/attention.h>

#include "core/host_device.h"

namespace fastattn {
namespace {

// Beyond these a cap is nothing (0), or all; its reciprocal stays a number.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline double computed_cap(double softcap) noexcept {
    return softcap > 1e30 ? 0.0 : (softcap > 0 && softcap < 1e-30 ? 1e-30 : softcap);
}

// Whether scores are more than scale * q.k and ranges of keys.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline bool is_elementwise(const AttentionProblem& p) noexcept {
    return computed_cap(p.softcap) > 0 || p.alibi_slopes.data != nullptr || p.bias.data != nullptr ||
           p.mask.data != nullptr;
}

// By the definition, in double; s = scale * q.k.
[[maybe_unused]] static inline double modified_score(const AttentionProblem& p, double s) noexcept {
    return p.softcap > 0 ? p.softcap * std::tanh(s / p.softcap) : s;
}

// Its derivative by s, where it is `score`.
[[maybe_unused]] static inline double score_slope(const AttentionProblem& p, double score) noexcept {
    return p.softcap > 0 ? 1.0 - (score / p.softcap) * (score / p.softcap) : 1.0;
}

}  // namespace
}  // namespace fastattn
