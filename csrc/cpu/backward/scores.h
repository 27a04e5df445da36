// The scores of the backward pass: x = score * log2 e, one row and one panel of keys at a time.
#pragma once

#include "cpu/flash/softmax.h"

namespace fastattn::cpu {
namespace {

// What a careful score is at least: -inf stands for keys that the row may not attend; of others it is a score
// that has no weight, but whose products may be NaN.
template <class Acc>
inline constexpr Acc lowest_score = std::numeric_limits<Acc>::lowest() / 2;

// Raw products with keys j, j+1, ... become x, with all arguments; cap: the derivative of the softcap.
template <class E>
void find_scores(const FlashBlock<E>& x, const RowInfo& row, std::int64_t j, bool careful,
                 typename E::Acc* scores, typename E::Acc* cap) {
    using V = typename E::V;
    using Acc = typename E::Acc;
    constexpr int w = V::width;
    const V lowest = V::set1(lowest_score<Acc>);
    for (int n = 0; n < E::nv; ++n) {
        V t[1] = {V::load(scores + n * w)};
        if (x.elementwise) {
            cap_scores(x, t);
            if (x.softcap > 0) {
                const V share = t[0] * V::set1(x.inverse_softcap);
                (V::set1(Acc(1)) - share * share).store(cap + n * w);
            }
            if (careful) t[0] = V::max(lowest, t[0]);
            place_scores(x, row, j + n * w, t);
        } else {
            t[0] = t[0] * V::set1(x.scale_log2e);
            if (careful) t[0] = V::max(lowest, t[0]);
        }
        keep_seen(row, j + n * w, t);
        t[0].store(scores + n * w);
    }
}

}  // namespace
}  // namespace fastattn::cpu
