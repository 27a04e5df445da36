// One query row of a chunk: which keys it may attend, and how a raw product becomes a score. The same order
// of operations as on the CPU (csrc/cpu/flash/softmax.h): scale, softcap, alibi, bias, restrictions.
#pragma once

#include "core/philox.h"
#include "core/scalar_access.h"
#include "core/score_math.h"
#include "core/visible.h"
#include "cuda/simt/arguments.h"
#include "cuda/simt/device.h"

namespace fastattn::cuda {
namespace {

inline constexpr double kLog2E = 1.4426950408889634074;
inline constexpr double kLn2 = 0.69314718055994530942;

// Finite scores beyond this count as this, so that times log2(e) they stay finite.
template <class Acc>
__device__ __forceinline__ Acc score_limit() {
    return static_cast<Acc>(sizeof(Acc) == 8 ? 1.7976931348623157e308 / 1.5 : 3.4028234663852886e38 / 1.5);
}

// A double as Acc; what is too large becomes the largest number.
template <class Acc>
__device__ __forceinline__ Acc to_finite(double x) {
    if constexpr (sizeof(Acc) == 8) return x;
    constexpr double most = 3.4028234663852886e38;
    return static_cast<Acc>(x > most ? most : (x < -most ? -most : x));
}

// What is said by row number alone.
struct RowPlace {
    Index b, h, i;  // batch entry, query head, query row
};

// a / b of numbers >= 0; 64-bit divisions cost several times the 32-bit ones.
__device__ __forceinline__ Index quotient(Index a, Index b) {
    if (((a | b) >> 32) == 0) return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
    return a / b;
}

// Row r of the scores of a chunk (SoftmaxArgs says how they lie).
__device__ __forceinline__ RowPlace place_of_row(Index group, const Chunk& chunk, bool group_inner, Index r) {
    const Index per_pair = group * chunk.rows;
    const Index pair = quotient(r, per_pair), inner = r - pair * per_pair;
    const Index run = group_inner ? group : chunk.rows;  // rows until the slower of the two indices changes
    const Index slow = quotient(inner, run), fast = inner - slow * run;
    const Index g = group_inner ? fast : slow, i = group_inner ? slow : fast;
    const Index entry = quotient(pair, chunk.kv_heads), kv_head = pair - entry * chunk.kv_heads;
    return {chunk.batch + entry, (chunk.kv_head + kv_head) * group + g, chunk.row + i};
}

__device__ __forceinline__ RowPlace place_of_row(const SoftmaxArgs& a, Index r) {
    return place_of_row(a.problem.group, a.chunk, a.group_inner, r);
}

__device__ __forceinline__ Index length_of(const HeadOperand& lens, bool given, Index b, Index size) {
    return given ? clamped(load_integer(lens.data, lens.dtype, b * lens.batch), 0, size) : size;
}

struct Row {
    RowPlace place;
    bool exists;  // i < q_len
    KeyRange range;  // by lengths, causal, window; empty for a row that does not exist
    double position;  // of the row among the keys, for alibi

    __device__ Row(const AttentionProblem& p, const RowPlace& at) : place(at) {
        const Index q_len = length_of(p.q_lens, p.has_q_lens, at.b, p.q_size);
        const Index kv_len = length_of(p.kv_lens, p.has_kv_lens, at.b, p.kv_size);
        Index first = kv_len - q_len;
        if (p.has_q_offset) {
            first = p.q_offsets.data == nullptr
                        ? p.q_offset
                        : load_integer(p.q_offsets.data, p.q_offsets.dtype, at.b * p.q_offsets.batch);
        }
        position = static_cast<double>(first) + static_cast<double>(at.i);
        exists = at.i < q_len;
        range = attended_range(p, kv_len, first, at.i);
        if (!exists) range.end = range.begin;
    }

    __device__ __forceinline__ Index offset(const ScoreOperand& x) const {
        return place.b * x.batch + place.h * x.head + place.i * x.query;
    }

    // All restrictions.
    __device__ bool attends(const AttentionProblem& p, Index j) const {
        if (!sees_key(range.begin, range.end, j)) return false;
        if (p.mask.data != nullptr &&
            load_as<std::uint8_t>(p.mask.data, offset(p.mask) + j * p.mask.key) == 0)
            return false;
        return p.bias.data == nullptr ||
               load_real(p.bias.data, p.bias.dtype, offset(p.bias) + j * p.bias.key) != -HUGE_VAL;
    }
};

template <class Acc>
__device__ __forceinline__ Acc load_bias(const ScoreOperand& bias, Index at) {
    if constexpr (sizeof(Acc) == 8) {
        return load_as<double>(bias.data, at);
    } else {
        switch (bias.dtype) {
            case DType::f16: return widen(static_cast<const F16*>(bias.data)[at]);
            case DType::bf16: return widen(static_cast<const BF16*>(bias.data)[at]);
            default: return load_as<float>(bias.data, at);
        }
    }
}

// How raw products of one row become x = score * log2(e), -inf where masked. Keys count from the chunk's
// first.
template <class Acc, bool plain>
struct Scorer {
    const AttentionProblem& p;
    double position;
    bool elementwise;
    Acc scale, cap, inverse_cap, slope;
    Index first;  // key
    int begin, end;  // of the row's range
    Index mask, bias;

    __device__ Scorer(const AttentionProblem& problem, const Chunk& chunk, const Row& r)
        : p(problem),
          position(r.position),
          first(chunk.key),
          begin(static_cast<int>(clamped(r.range.begin - chunk.key, 0, chunk.keys))),
          end(static_cast<int>(clamped(r.range.end - chunk.key, 0, chunk.keys))) {
        elementwise = !plain && is_elementwise(p);
        scale = to_finite<Acc>(elementwise ? p.scale : p.scale * kLog2E);
        if constexpr (!plain) {
            const double c = computed_cap(p.softcap);
            cap = static_cast<Acc>(c);
            inverse_cap = static_cast<Acc>(c > 0 ? 1.0 / c : 0.0);
            slope = p.alibi_slopes.data == nullptr
                        ? Acc(0)
                        : to_finite<Acc>(
                              -load_real(p.alibi_slopes.data, p.alibi_slopes.dtype,
                                         r.place.b * p.alibi_slopes.batch + r.place.h * p.alibi_slopes.head));
            mask = p.mask.data == nullptr ? 0 : r.offset(p.mask);
            bias = p.bias.data == nullptr ? 0 : r.offset(p.bias);
        }
    }

    __device__ __forceinline__ Acc operator()(int v, Acc raw) const {
        Acc derivative;
        return (*this)(v, raw, derivative);
    }

    // derivative: of the score by scale * q.k.
    __device__ __forceinline__ Acc operator()(int v, Acc raw, Acc& derivative) const {
        const Acc masked = -infinity<Acc>();
        derivative = 1;
        if (!sees_key(begin, end, v)) return masked;
        Acc t = times(raw, scale);
        if (!elementwise) return t;
        if (modifies()) t = modified(t, derivative);
        if (p.mask.data != nullptr && is_masked(v)) return masked;
        if (p.alibi_slopes.data != nullptr) t = with_alibi(t, distance(v));
        if (p.bias.data != nullptr) {
            const Acc add = load_bias<Acc>(p.bias, bias + (first + v) * p.bias.key);
            t = with_bias(t, add);
        }
        return limited(t);
    }

    // ---- its operations; v counts keys from the chunk's first ---------------------------------------------
    // What comes before biases: core/score_math.h.
    __device__ __forceinline__ bool modifies() const { return cap > 0; }
    __device__ __forceinline__ Acc modified(Acc t, Acc& derivative) const {
        const Acc share = static_cast<Acc>(tanh(times(t, inverse_cap)));
        derivative = Acc(1) - share * share;
        return times(cap, share);
    }
    __device__ __forceinline__ bool is_masked(int v) const {
        return load_as<std::uint8_t>(p.mask.data, mask + (first + v) * p.mask.key) == 0;
    }
    __device__ __forceinline__ Acc distance(int v) const {
        return static_cast<Acc>(fabs(position - static_cast<double>(first + v)));
    }
    __device__ __forceinline__ Acc with_alibi(Acc t, Acc distance) const {
        return plus(t, times(slope, distance));
    }
    // -inf masks, whatever the score.
    __device__ __forceinline__ Acc with_bias(Acc t, Acc add) const {
        return add == -infinity<Acc>() ? add : plus(t, add);
    }
    // Finite scores stay finite, in units of x.
    __device__ __forceinline__ Acc limited(Acc t) const {
        const Acc limit = score_limit<Acc>();
        if (t > limit && t < infinity<Acc>()) t = limit;
        if (t < -limit && t > -infinity<Acc>()) t = -limit;
        return times(t, static_cast<Acc>(kLog2E));
    }
    // f(a function that gives the bias of v), so that its type is asked for once: that of the arrays, T, or
    // float.
    template <class T, class F>
    __device__ __forceinline__ void with_bias_type(F f) const {
        const Index row = bias + first * p.bias.key, step = p.bias.key;
        const void* const data = p.bias.data;
        if (p.bias.dtype == DType::f32) {
            f([=](int v) { return static_cast<const float*>(data)[row + v * step]; });
        } else {
            f([=](int v) { return widen(static_cast<const T*>(data)[row + v * step]); });
        }
    }
};

// The denominator of a row's softmax, of its keys (m = max x, l = sum 2^(x - m)) and of its sink, one more
// score without a value. A sink of +inf takes all the weight instead of giving NaN.
template <class Acc>
class Denominator {
public:
    __device__ Denominator(const AttentionProblem& p, const Row& row, Acc max, Acc sum) {
        if (row.exists && p.sinks.data != nullptr) {
            raw = load_real(p.sinks.data, p.sinks.dtype, row.place.h * p.sinks.head);
            const double limit = static_cast<double>(score_limit<Acc>());
            sink = static_cast<Acc>(raw) == infinity<Acc>() || raw == -HUGE_VAL
                       ? static_cast<Acc>(raw)
                       : static_cast<Acc>((raw > limit ? limit : (raw < -limit ? -limit : raw)) * kLog2E);
        }
        top = larger(max, sink);
        Acc share = 1;  // 2^(max - top)
        total = sum;
        if (sink != -infinity<Acc>()) {
            share = max == -infinity<Acc>() ? Acc(0) : power2(max - top);
            total = sum * share + (sink == infinity<Acc>() ? Acc(1) : power2(sink - top));
        }
        factor = static_cast<Acc>(static_cast<double>(share) / static_cast<double>(total));
    }

    // Neither 0 (nothing attended, or scores of -inf alone) nor NaN.
    __device__ bool is_regular() const { return total > 0; }

    __device__ double log_sum() const {
        // At score_limit all that is known is that the score was about the type's largest number.
        constexpr double most = sizeof(Acc) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
        const double edge = static_cast<double>(score_limit<Acc>()) * 1.44, t = static_cast<double>(top);
        if (total == Acc(0)) return -HUGE_VAL;
        if (t <= -edge && total == total) return -most;
        if (t >= edge && t < HUGE_VAL && total == total) return most;
        // A sink alone comes back as it was.
        if (top == sink) return raw + log(static_cast<double>(total));
        return (t + log2(static_cast<double>(total))) * kLn2;
    }

    // Of the sink.
    __device__ Acc sink_weight() const {
        if (sink == -infinity<Acc>()) return 0;
        return (sink == infinity<Acc>() ? Acc(1) : power2(sink - top)) / total;
    }

    Acc factor;  // 2^(x - m) times this is the weight of a key

private:
    Acc sink = -infinity<Acc>(), top, total;  // sink: in units of x
    double raw = -HUGE_VAL;
};

}  // namespace
}  // namespace fastattn::cuda
