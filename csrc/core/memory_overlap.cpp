#include "core/memory_overlap.h"

#include <algorithm>
#include <numeric>

namespace fastattn {
namespace {

using Index = std::int64_t;

// No real array reaches over more bytes; sums of a few reaches then stay within 64 bits.
constexpr Index kMaxReach = Index{1} << 60;

// Steps into the equation  sum_n x_n * step_n + w = target,  0 <= x_n <= count_n,  0 <= w <= slack.
struct Equation {
    struct Term {
        Index step, count;
    };
    Term terms[2 * kMaxRank];
    Index reach[2 * kMaxRank + 1];     // largest value of the terms from n on, slack included
    Index divisor[2 * kMaxRank + 1];   // greatest common divisor of their steps
    int size = 0;
    Index slack = 0;
    int budget = 20000;

    void add(Index step, Index count) noexcept {
        for (int n = 0; n < size; ++n) {
            if (terms[n].step == step) {
                terms[n].count += count;
                return;
            }
        }
        terms[size++] = {step, count};
    }

    void prepare() noexcept {
        std::sort(terms, terms + size, [](const Term& a, const Term& b) { return a.step > b.step; });
        reach[size] = slack;
        divisor[size] = 0;
        for (int n = size - 1; n >= 0; --n) {
            reach[n] = reach[n + 1] + terms[n].step * terms[n].count;
            divisor[n] = std::gcd(divisor[n + 1], terms[n].step);
        }
    }

    // True also when the budget runs out.
    bool solvable(int n, Index target) noexcept {
        if (target < 0 || target > reach[n]) return false;
        if (n == size || --budget < 0) return true;
        if (target % divisor[n] > slack) return false;
        const auto [step, count] = terms[n];
        const Index rest = target - reach[n + 1];
        const Index first = rest <= 0 ? 0 : (rest + step - 1) / step;
        const Index last = std::min(count, target / step);
        for (Index x = first; x <= last; ++x)
            if (solvable(n + 1, target - x * step)) return true;
        return false;
    }
};

}  // namespace

ViewCheck measure(const TensorView& view) noexcept {
    const Index item = static_cast<Index>(item_size(view.dtype));
    Index bytes = item, below = 0, above = item;
    bool empty = false;
    for (int axis = 0; axis < view.rank; ++axis) {
        const Index n = view.shape[axis];
        if (n < 0) return {{}, ViewFault::negative_size};
        if (n == 0) empty = true;
        if (n > 1 && multiply_overflows(bytes, n, &bytes)) return {{}, ViewFault::too_many_bytes};
    }
    if (empty) return {};
    for (int axis = 0; axis < view.rank; ++axis) {
        const Index n = view.shape[axis], stride = view.strides[axis];
        if (n == 1 || stride == 0) continue;
        Index span = 0;
        if (stride < -kMaxReach || stride > kMaxReach ||
            multiply_overflows(stride < 0 ? -stride : stride, (n - 1) * item, &span) || span > kMaxReach)
            return {{}, ViewFault::reaches_too_far};
        (stride < 0 ? below : above) += span;
    }
    if (above > kMaxReach || below > kMaxReach) return {{}, ViewFault::reaches_too_far};
    const auto base = reinterpret_cast<std::uintptr_t>(view.data);
    if (base == 0) return {{}, ViewFault::null_data};
    if (base % static_cast<std::uintptr_t>(item) != 0) return {{}, ViewFault::misaligned};
    return {{base - static_cast<std::uintptr_t>(below), base + static_cast<std::uintptr_t>(above)},
            ViewFault::none};
}

// An address of a is  a.data + sum x*s + w_a,  one of b  b.data + sum y*t + w_b.  Their difference is
// zero somewhere iff the equation has a solution, once every negative coefficient is counted from its
// other end.
bool may_share_memory(const TensorView& a, const TensorView& b) noexcept {
    const Index item_a = static_cast<Index>(item_size(a.dtype)),
                item_b = static_cast<Index>(item_size(b.dtype));
    Equation equation;
    auto target = static_cast<Index>(reinterpret_cast<std::uintptr_t>(b.data) -
                                     reinterpret_cast<std::uintptr_t>(a.data));
    const auto add_axes = [&](const TensorView& view, Index item, Index sign) {
        for (int axis = 0; axis < view.rank; ++axis) {
            const Index count = view.shape[axis] - 1, step = sign * view.strides[axis] * item;
            if (count == 0 || step == 0) continue;
            if (step < 0) target += -step * count;
            equation.add(step < 0 ? -step : step, count);
        }
    };
    add_axes(a, item_a, 1);
    add_axes(b, item_b, -1);
    target += item_b - 1;  // w = w_a + (item_b - 1 - w_b)
    equation.slack = item_a + item_b - 2;
    equation.prepare();
    return equation.solvable(0, target);
}

bool overlaps_itself(const TensorView& view) noexcept {
    struct Axis {
        Index stride, size;
    } axes[kMaxRank];
    int count = 0;
    for (int axis = 0; axis < view.rank; ++axis) {
        if (view.shape[axis] == 0) return false;
        if (view.shape[axis] == 1) continue;
        const Index stride = view.strides[axis] < 0 ? -view.strides[axis] : view.strides[axis];
        // Insertion sort by stride: four axes at most.
        int at = count++;
        for (; at > 0 && axes[at - 1].stride > stride; --at) axes[at] = axes[at - 1];
        axes[at] = {stride, view.shape[axis]};
    }
    Index span = 1;
    for (int n = 0; n < count; ++n) {
        if (axes[n].stride < span) return true;
        span += axes[n].stride * (axes[n].size - 1);
    }
    return false;
}

}  // namespace fastattn
