// The scores of one query row in double, by their definition: what the reference's forward and backward
// share.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include <fastattn/attention.h>

#include "core/entry.h"
#include "core/keys.h"
#include "core/philox.h"
#include "core/scalar_access.h"
#include "core/score_math.h"
#include "threads/executor.h"

namespace fastattn {
namespace {

struct F16 {
    std::uint16_t bits;
};
struct BF16 {
    std::uint16_t bits;
};

inline double to_double(double x) { return x; }
inline double to_double(float x) { return static_cast<double>(x); }
inline double to_double(F16 x) { return static_cast<double>(f16_to_f32(x.bits)); }
inline double to_double(BF16 x) { return static_cast<double>(bf16_to_f32(x.bits)); }

// f(T{}) for the type of the elements.
template <class F>
void with_element_type(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f64: return f(double{});
        case DType::f32: return f(float{});
        case DType::f16: return f(F16{});
        case DType::bf16: return f(BF16{});
        default: return;
    }
}

// Feature 0 of row i of head h.
template <class T>
const T* features(const Operand& x, std::int64_t b, std::int64_t i, std::int64_t h) {
    return static_cast<const T*>(x.data) + b * x.batch + i * x.seq + h * x.head;
}

inline std::int64_t score_index(const ScoreOperand& x, std::int64_t b, std::int64_t h, std::int64_t i,
                                std::int64_t j) {
    return b * x.batch + h * x.head + i * x.query + j * x.key;
}

// Query i of head h in batch entry b. T is the dtype of q, k and v; scratch holds D doubles.
template <class T>
class ReferenceRow {
public:
    using Index = std::int64_t;
    static constexpr double kInfinity = std::numeric_limits<double>::infinity();

    ReferenceRow(const AttentionProblem& problem, const Entry& entry, double* scratch, Index batch,
                 Index head, Index row)
        : p(problem),
          b(batch),
          h(head),
          i(row),
          kv_head(head / problem.group),
          keys(p.k, b, kv_head),
          values(p.v, b, kv_head),
          query(scratch) {
        exists = i < entry.q_len;
        if (exists) range = row_keys(p, entry, h, i, list);
        position = static_cast<double>(entry.offset) + static_cast<double>(i);
        if (p.alibi_slopes.data != nullptr)
            slope = load_real(p.alibi_slopes.data, p.alibi_slopes.dtype,
                              b * p.alibi_slopes.batch + h * p.alibi_slopes.head);
        if (p.sinks.data != nullptr) sink = load_real(p.sinks.data, p.sinks.dtype, h * p.sinks.head);
        if (!exists) return;
        const T* q = features<T>(p.q, b, i, h);
        for (Index d = 0; d < p.head_dim; ++d) query[d] = to_double(q[d * p.q.dim]);
    }

    // Whether the row may attend key j, which lies in its range; its bias then.
    bool attends(Index j, double& bias) const {
        bias = 0.0;
        if (list.first != nullptr && !in_list(list, j)) return false;
        if (p.mask.data != nullptr &&
            load_as<std::uint8_t>(p.mask.data, score_index(p.mask, b, h, i, j)) == 0)
            return false;
        if (p.bias.data != nullptr)
            bias = load_real(p.bias.data, p.bias.dtype, score_index(p.bias, b, h, i, j));
        return bias != -kInfinity;
    }

    // softcap(scale * q.k)
    double capped(Index j) const {
        const T* k = keys[j];
        double s = 0.0;
        for (Index d = 0; d < p.head_dim; ++d) s += query[d] * to_double(k[d * keys.number_stride()]);
        s *= p.scale;
        return modified_score(p, s);
    }
    double distance(Index j) const { return std::abs(position - static_cast<double>(j)); }
    // alibi and bias on top of it
    double placed(double s, Index j, double bias) const {
        return (p.alibi_slopes.data != nullptr ? s - slope * distance(j) : s) + bias;
    }
    double score(Index j, double bias) const { return placed(capped(j), j, bias); }

    bool dropped(Index j) const {
        if (p.dropout == 0.0) return false;
        const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
        const PhiloxBlock block = philox4x32(word(j / 4), word(i), word(h), word(b), p.seed);
        return block.word[j % 4] < dropout_threshold(p.dropout);
    }

    // f(j, bias) for every key that the row may attend; false when asked to stop.
    template <class F>
    bool for_attended_keys(Executor& executor, F f) const {
        for (Index j = range.begin; j < range.end; ++j) {
            if ((j - range.begin) % kKeysPerStopCheck == 0 && executor.stop_requested()) return false;
            double bias;
            if (attends(j, bias)) f(j, bias);
        }
        return true;
    }

    // exp(s - max), but 0 and not NaN where nothing above -inf is attended.
    static double weight(double s, double max) { return s == -kInfinity ? 0.0 : std::exp(s - max); }
    // The same, but a sink of +inf takes all the weight instead of giving NaN.
    double sink_weight(double max) const { return sink == kInfinity ? 1.0 : weight(sink, max); }

    const AttentionProblem& p;
    const Index b, h, i, kv_head;
    const KeyRows<T> keys, values;
    bool exists;
    KeyRange range;
    RowSpans list;  // where the row has not all keys of its range
    double position = 0.0, slope = 0.0, sink = -kInfinity;

private:
    static constexpr Index kKeysPerStopCheck = 64;
    double* query;  // (D,)
};

}  // namespace
}  // namespace fastattn
