// What stands between the products of the backward pass:
//
//   row_states       dout, out, dlse, lse -> what the pairs of a row share
//   score_gradients  S, dP -> P and dS in their place; dS |p - j| summed, dS for dbias
//   row_units, scale_rows, add_keys
//                    float16 only: dS of a head is stored in units of its own, a power of two by its largest
//                    element
//   clean_rows, any_bad, repair
//                    products read masked pairs too, and 0 * NaN is NaN: they get k, q and dout with zeros in
//                    place of NaN and Inf, and what those give to the pairs that are attended is added
//                    pair by pair
//   bias_sums, head_sums, store_rows, store_bias, store_heads
//                    sums that do not depend on the order of threads, and their results
#pragma once

#include "core/keys.h"
#include "cuda/simt/row.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kBackwardBlock = 256;  // threads
inline constexpr int kBackwardWarps = kBackwardBlock / 32;

template <class Acc>
__device__ __forceinline__ bool is_finite(Acc x) {
    return x - x == Acc(0);
}

template <class T>
__device__ __forceinline__ T* row_of(const Operand& x, Index b, Index s, Index h) {
    return static_cast<T*>(x.data) + b * x.batch + s * x.seq + h * x.head;
}

__device__ __forceinline__ Index warp_number() {
    return Index{blockIdx.x} * kBackwardWarps + threadIdx.x / 32;
}
__device__ __forceinline__ int warp_lane_of() { return static_cast<int>(threadIdx.x % 32); }

// ---- where the arrays of a region are ---------------------------------------------------------------------
__device__ __forceinline__ Index region_row(const BackwardArgs& a, const RowPlace& at) {
    const Index group = a.problem.forward.group;
    const Index heads = a.region.kv_heads * group;
    return ((at.b - a.region.batch) * heads + at.h - a.region.kv_head * group) * a.region.rows + at.i -
           a.region.row;
}

__device__ __forceinline__ Index region_pair(const BackwardArgs& a, Index b, Index kv_head) {
    return (b - a.region.batch) * a.region.kv_heads + kv_head - a.region.kv_head;
}

template <class Acc>
__device__ __forceinline__ RowState<Acc>& state_of(const BackwardArgs& a, const RowPlace& at) {
    return static_cast<RowState<Acc>*>(a.states)[region_row(a, at)];
}

__device__ __forceinline__ Index chunk_rows(const BackwardArgs& a) {
    return a.chunk.batches * a.chunk.kv_heads * a.problem.forward.group * a.chunk.rows;
}

__device__ __forceinline__ RowPlace place_of_row(const BackwardArgs& a, Index r) {
    return place_of_row(a.problem.forward.group, a.chunk, a.group_inner, r);
}

// The row of scores of a query row: the inverse of place_of_row().
__device__ __forceinline__ Index row_at(const BackwardArgs& a, Index b, Index h, Index i) {
    const Index group = a.problem.forward.group, kv_head = quotient(h, group), g = h - kv_head * group;
    const Index pair = (b - a.chunk.batch) * a.chunk.kv_heads + kv_head - a.chunk.kv_head;
    const Index slow = a.group_inner ? i - a.chunk.row : g, fast = a.group_inner ? g : i - a.chunk.row;
    return pair * group * a.chunk.rows + slow * (a.group_inner ? group : a.chunk.rows) + fast;
}

// ---- rows -------------------------------------------------------------------------------------------------
__device__ __forceinline__ double given_dlse(const BackwardProblem& b, const Row& row) {
    return b.dlse.data == nullptr ? 0.0 : load_real(b.dlse.data, b.dlse.dtype, row.offset(b.dlse));
}

// shift is lse in powers of two, rounded to an integer, so that x - shift loses nothing.
template <class Acc>
__device__ __forceinline__ void set_weights(const AttentionProblem& p, const Row& row, RowState<Acc>& state) {
    constexpr double most = sizeof(Acc) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
    const double lse = load_real(p.lse.data, p.lse.dtype, row.offset(p.lse));
    if (p.sinks.data != nullptr) {
        const double sink = load_real(p.sinks.data, p.sinks.dtype, row.place.h * p.sinks.head);
        // A sink of +inf has all the weight.
        state.sink = static_cast<Acc>(sink == -HUGE_VAL ? 0.0 : (sink == HUGE_VAL ? 1.0 : exp(sink - lse)));
    }
    if (lse == -HUGE_VAL) return;  // nothing attended, or only scores of -inf: no weights
    state.factor = 1;
    state.shift = static_cast<Acc>(lse);
    if (!is_finite(lse)) return;
    const double t = lse * kLog2E, whole = rint(t);
    state.shift = static_cast<Acc>(whole > most ? most : (whole < -most ? -most : whole));
    if (is_finite(t)) state.factor = static_cast<Acc>(exp2(static_cast<double>(state.shift) - t));
}

// A warp for each row of the region.
template <class T, class Acc>
__global__ void __launch_bounds__(kBackwardBlock) row_states(const __grid_constant__ BackwardArgs a) {
    const AttentionProblem& p = a.problem.forward;
    const Index heads = a.region.kv_heads * p.group;
    const Index r = warp_number();
    if (r >= a.region.batches * heads * a.region.rows) return;
    const Index bh = quotient(r, a.region.rows), b = quotient(bh, heads);
    const Row row(p, {a.region.batch + b, a.region.kv_head * p.group + bh - b * heads,
                      a.region.row + r - bh * a.region.rows});
    RowState<Acc> state{};
    state.unit = 1;
    if (row.exists) {
        const T* dout = row_of<const T>(a.problem.dout, row.place.b, row.place.i, row.place.h);
        const T* out = row_of<const T>(p.out, row.place.b, row.place.i, row.place.h);
        Acc sum = 0;
        for (Index d = warp_lane_of(); d < p.value_dim; d += 32)
            sum += widen(dout[d * a.problem.dout.dim]) * widen(out[d * p.out.dim]);
        sum = Group<32>::reduce(sum, [](Acc s, Acc t) { return s + t; });
        state.delta = sum - static_cast<Acc>(given_dlse(a.problem, row));
        set_weights(p, row, state);
    }
    if (warp_lane_of() == 0) static_cast<RowState<Acc>*>(a.states)[r] = state;
}

// ---- P and dS ---------------------------------------------------------------------------------------------
// A group of threads owns a row of the chunk, as in softmax_rows.
template <class T, class Acc, int threads, bool plain>
class GradientRow {
public:
    using G = Group<threads>;
    static constexpr int kStep = 4 * threads;  // keys that the group takes at once
    static constexpr bool kScaled = std::is_same_v<T, F16>;  // dS stays in Acc until its unit is known

    __device__ GradientRow(const BackwardArgs& args, Index r)
        : a(args),
          p(args.problem.forward),
          number(r),
          row(args.problem.forward, place_of_row(args, r)),
          score(args.problem.forward, args.chunk, row),
          keep_factor(static_cast<Acc>(1.0 / (1.0 - args.problem.forward.dropout))),
          keys(static_cast<int>(args.chunk.keys)),
          scores(static_cast<Acc*>(args.scores) + r * args.ld),
          gradients(static_cast<Acc*>(args.gradients) + r * args.ld),
          bias_gradients(args.bias_gradients == nullptr
                             ? nullptr
                             : static_cast<Acc*>(args.bias_gradients) + r * args.ld),
          mine(state_of<Acc>(args, row.place)),
          state(mine) {}

    __device__ void compute() {
        const Acc size = state.shift < 0 ? -state.shift : state.shift;
        if ((size > static_cast<Acc>(coarse()) && is_finite(size)) || !is_finite(state.delta))
            state = refined(a, number);
        for (int first = 0; first < keys; first += kStep) {
            const int v = first + 4 * G::lane();
            Acc kept[4] = {}, ds[4] = {};
            if (v < keys) find(v, kept, ds);
            // A step is read by all before its results go over what was read in this step or before.
            G::sync();
            if (v < keys) store(v, kept, ds);
        }
        if constexpr (!plain) {
            if (a.slopes != nullptr) {
                const Acc sum = G::reduce(slope, [](Acc s, Acc t) { return s + t; });
                if (G::lane() == 0) static_cast<Acc*>(a.slopes)[region_row(a, row.place)] = sum;
            }
        }
        if constexpr (kScaled) {
            const Acc largest = G::reduce(most, [](Acc s, Acc t) { return larger(s, t); });
            if (G::lane() == 0) mine.unit = largest;
        }
    }

private:
    static __device__ __forceinline__ Quad<Acc> load(const Acc* from, int v) {
        return *reinterpret_cast<const Quad<Acc>*>(from + v);
    }

    __device__ __forceinline__ void find(int v, Acc (&kept)[4], Acc (&ds)[4]) {
        const Quad<Acc> raw = load(scores, v), products = load(gradients, v);
        const Index j = a.chunk.key + v;
        PhiloxBlock random{};
        if (!plain && p.dropout > 0) {
            const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
            random = philox4x32(word(j / 4), word(row.place.i), word(row.place.h), word(row.place.b), p.seed);
        }
        Quad<Acc> of_bias{};
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
            Acc derivative;
            const Acc x = score(v + e, raw.at[e], derivative);
            if (x == -infinity<Acc>()) continue;  // whatever k, v, q and dout hold
            const Acc weight = power2(x - state.shift) * state.factor;
            Acc keep = 1, dp = products.at[e];
            if (!plain && p.dropout > 0) {
                keep = random.word[e] < dropout_threshold(p.dropout) ? Acc(0) : Acc(1);
                dp *= keep * keep_factor;
            }
            Acc g = weight * (dp - state.delta);
            kept[e] = weight * keep * static_cast<Acc>(weight_scale(p.dtype));
            if constexpr (!plain) {
                of_bias.at[e] = g;
                if (a.slopes != nullptr)
                    slope += g * static_cast<Acc>(fabs(row.position - static_cast<double>(j + e)));
                if (score.modifies()) g *= derivative;
            }
            ds[e] = g;
            if constexpr (kScaled) {
                const Acc size = g < 0 ? -g : g;
                if (is_finite(size)) most = larger(most, size);
            }
        }
        if constexpr (!plain) {
            if (bias_gradients != nullptr) *reinterpret_cast<Quad<Acc>*>(bias_gradients + v) = of_bias;
        }
    }

    __device__ __forceinline__ void store(int v, const Acc (&kept)[4], const Acc (&ds)[4]) {
        using Stored = std::conditional_t<kScaled, Acc, T>;
        Quad<T> weights;
        Quad<Stored> out;
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
            narrow(kept[e], weights.at[e]);
            narrow(ds[e], out.at[e]);
        }
        *reinterpret_cast<Quad<T>*>(reinterpret_cast<T*>(scores) + v) = weights;
        *reinterpret_cast<Quad<Stored>*>(reinterpret_cast<Stored*>(gradients) + v) = out;
    }

    // The row's largest score and its sum of weights anew, used where they agree with lse as far as that
    // tells (it may be of more keys than these), or where lse is about its type's largest number, which says
    // nothing but that. And the delta of a row that may attend nothing is a sum of nothing, whatever its dout
    // holds. In a function of its own, which has no part in the registers of the others.
    __device__ static __noinline__ RowState<Acc> refined(const BackwardArgs& a, Index r) {
        constexpr double epsilon = sizeof(Acc) == 8 ? 0x1p-52 : 0x1p-23;
        constexpr double limit = sizeof(Acc) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38;
        const AttentionProblem& p = a.problem.forward;
        const Row row(p, place_of_row(a, r));
        const Scorer<Acc, plain> score(p, a.chunk, row);
        const Acc* scores = static_cast<const Acc*>(a.scores) + r * a.ld;
        const int keys = static_cast<int>(a.chunk.keys);
        RowState<Acc>& mine = state_of<Acc>(a, row.place);
        RowState<Acc> state = mine;
        Acc top = -infinity<Acc>(), sum = 0, attended = 0;
        for (int v = G::lane(); v < keys; v += threads) {
            top = larger(top, score(v, scores[v]));
            if (row.attends(p, a.chunk.key + v)) attended = 1;
        }
        top = G::reduce(top, [](Acc s, Acc t) { return larger(s, t); });
        attended = G::reduce(attended, [](Acc s, Acc t) { return larger(s, t); });
        const Acc shift = top == -infinity<Acc>() ? Acc(0) : top;
        for (int v = G::lane(); v < keys; v += threads) sum += power2(score(v, scores[v]) - shift);
        sum = G::reduce(sum, [](Acc s, Acc t) { return s + t; });
        if (attended == 0) state.delta = -static_cast<Acc>(given_dlse(a.problem, row));
        const double lse = load_real(p.lse.data, p.lse.dtype, row.offset(p.lse));
        const double size = lse < 0 ? -lse : lse;
        const Denominator<Acc> found(p, row, top, sum);
        const bool at_limit = size >= limit / 1.5 * (1 - 1e-6);  // score_limit()
        if (row.exists && is_finite(lse) && size * kLog2E > coarse() && found.is_regular() &&
            (at_limit || fabs(found.log_sum() - lse) <= 4 * epsilon * size)) {
            state.shift = shift;
            state.factor = found.factor;
            state.sink = found.sink_weight();
        }
        if (G::lane() == 0) mine = state;
        return state;
    }

    // From this size on lse (in powers of two) says too little of the sum of the weights, which is up to the
    // number of keys.
    static __device__ __forceinline__ constexpr double coarse() { return sizeof(Acc) == 8 ? 0x1p42 : 0x1p13; }

    const BackwardArgs& a;
    const AttentionProblem& p;
    const Index number;  // of the row in the chunk
    const Row row;
    const Scorer<Acc, plain> score;
    const Acc keep_factor;  // of what dropout leaves
    const int keys;  // of the chunk
    Acc *scores, *gradients, *bias_gradients;
    RowState<Acc>& mine;
    RowState<Acc> state;
    Acc slope = 0, most = 0;
};

template <class T, class Acc, int threads, bool plain>
__global__ void __launch_bounds__(kBackwardBlock) score_gradients(const __grid_constant__ BackwardArgs a) {
    const Index r = Index{blockIdx.x} * (kBackwardBlock / threads) + threadIdx.x / threads;
    if (r < chunk_rows(a)) GradientRow<T, Acc, threads, plain>(a, r).compute();
}

// ---- float16: units of dS ---------------------------------------------------------------------------------
// A block for each (batch entry, kv head) of the chunk: dS / unit is below 2^15 and its largest element at
// least half of that. Down to 2^-29 of it nothing of the 11 bits is lost.
__global__ void __launch_bounds__(kBackwardBlock) row_units(const __grid_constant__ BackwardArgs a) {
    const Index group = a.problem.forward.group;
    const Index entry = quotient(Index{blockIdx.x}, a.chunk.kv_heads);
    const Index b = a.chunk.batch + entry,
                kv_head = a.chunk.kv_head + Index{blockIdx.x} - entry * a.chunk.kv_heads;
    const Index rows = group * a.chunk.rows;
    const auto state = [&](Index n) -> RowState<float>& {
        const Index g = quotient(n, a.chunk.rows);
        return state_of<float>(a, {b, kv_head * group + g, a.chunk.row + n - g * a.chunk.rows});
    };
    float most = 0;
    for (Index n = threadIdx.x; n < rows; n += kBackwardBlock) most = larger(most, state(n).unit);
    most = Group<kBackwardBlock>::reduce(most, [](float s, float t) { return larger(s, t); });
    int exponent = 0;
    frexpf(most, &exponent);  // most < 2^exponent
    exponent = most == 0 ? 0 : (exponent < -100 ? -100 : exponent) - 15;
    const float unit = exp2f(static_cast<float>(exponent));
    for (Index n = threadIdx.x; n < rows; n += kBackwardBlock) state(n).unit = unit;
    if (threadIdx.x == 0) static_cast<float*>(a.units)[region_pair(a, b, kv_head)] = unit;
}

// dS of float16 problems over itself, in its unit.
template <int threads>
__global__ void __launch_bounds__(kBackwardBlock) scale_rows(const __grid_constant__ BackwardArgs a) {
    using G = Group<threads>;
    const Index r = Index{blockIdx.x} * (kBackwardBlock / threads) + threadIdx.x / threads;
    if (r >= chunk_rows(a)) return;
    const float factor = 1.0f / state_of<float>(a, place_of_row(a, r)).unit;
    float* const gradients = static_cast<float*>(a.gradients) + r * a.ld;
    const int keys = static_cast<int>(a.chunk.keys);
    for (int first = 0; first < keys; first += 4 * threads) {
        const int v = first + 4 * G::lane();
        Quad<float> ds{};
        if (v < keys) ds = *reinterpret_cast<const Quad<float>*>(gradients + v);
        G::sync();
        Quad<F16> out;
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) narrow(ds.at[e] * factor, out.at[e]);
        if (v < keys) *reinterpret_cast<Quad<F16>*>(reinterpret_cast<F16*>(gradients) + v) = out;
    }
}

// dk += unit * dk_part; a warp for each key of the chunk.
__global__ void __launch_bounds__(kBackwardBlock) add_keys(const __grid_constant__ BackwardArgs a) {
    const Index n = warp_number();
    if (n >= a.chunk.batches * a.chunk.kv_heads * a.chunk.keys) return;
    const Index pair = quotient(n, a.chunk.keys), entry = quotient(pair, a.chunk.kv_heads);
    const Index b = a.chunk.batch + entry, kv_head = a.chunk.kv_head + pair - entry * a.chunk.kv_heads;
    const Index j = a.chunk.key + n - pair * a.chunk.keys;
    const float unit = static_cast<const float*>(a.units)[region_pair(a, b, kv_head)];
    const float* part = row_of<const float>(a.dk_part, b, j, kv_head);
    float* sum = row_of<float>(a.dk, b, j, kv_head);
    for (Index d = warp_lane_of(); d < a.problem.forward.head_dim; d += 32) sum[d] += part[d] * unit;
}

// ---- NaN and Inf of masked pairs --------------------------------------------------------------------------
// A warp for each row.
template <class T>
__global__ void __launch_bounds__(kBackwardBlock) clean_rows(const __grid_constant__ CleanArgs args) {
    const CopyArgs& a = args.copy;
    const Index r = warp_number();
    if (r >= a.batches * a.heads * a.rows) return;
    const Index bh = quotient(r, a.rows), b = quotient(bh, a.heads), h = bh - b * a.heads,
                s = r - bh * a.rows;
    const T* source = row_of<const T>(a.source, b, s, h);
    T* target = row_of<T>(a.target, b, s, h);
    bool bad = false;
    for (Index d = warp_lane_of(); d < a.dims; d += 32) {
        const T x = source[d * a.source.dim];
        const bool finite = is_finite(widen(x));
        target[d * a.target.dim] = finite ? x : T{};
        bad |= !finite;
    }
    const bool any = __any_sync(0xFFFFFFFFu, bad) != 0;
    if (warp_lane_of() == 0) args.bad[r] = any;
}

// A block for each n.
__global__ void __launch_bounds__(kBackwardBlock) any_bad(const __grid_constant__ AnyArgs a) {
    const std::uint8_t* bad = a.bad + Index{blockIdx.x} * a.size;
    int any = 0;
    for (Index n = threadIdx.x; n < a.size; n += kBackwardBlock) any |= bad[n];
    any = Group<kBackwardBlock>::reduce(any, [](int s, int t) { return s | t; });
    if (threadIdx.x == 0) a.any[blockIdx.x] = any != 0;
}

// sum += weight * the elements that clean_rows() left out.
template <class T, class Acc>
__device__ __forceinline__ void add_bad_row(Acc* sum, Acc weight, const T* row, Index stride, Index dims) {
    for (Index d = warp_lane_of(); d < dims; d += 32) {
        const Acc x = widen(row[d * stride]);
        if (!is_finite(x)) sum[d] += weight * x;
    }
}

template <class T, class Acc>
__device__ __noinline__ void repair_query(const BackwardArgs& a, Index r, const RowPlace& at) {
    const AttentionProblem& p = a.problem.forward;
    const Index kv_head = quotient(at.h, p.group);
    const Row row(p, at);
    const T* gradients = reinterpret_cast<const T*>(static_cast<const Acc*>(a.gradients) + r * a.ld);
    const std::uint8_t* bad = a.bad_k + region_pair(a, at.b, kv_head) * a.region.keys - a.region.key;
    const KeyRows<T> k(p.k, at.b, kv_head);
    for (Index n = 0; n < a.chunk.keys; ++n) {
        const Index j = a.chunk.key + n;
        if (bad[j] != 0 && row.attends(p, j))
            add_bad_row<T, Acc>(row_of<Acc>(a.dq, at.b, at.i, at.h), widen(gradients[n]), k[j],
                                k.number_stride(), p.head_dim);
    }
}

template <class T, class Acc>
__device__ __noinline__ void repair_key(const BackwardArgs& a, Index b, Index kv_head, Index n) {
    const AttentionProblem& p = a.problem.forward;
    const Index j = a.chunk.key + n;
    for (Index h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h) {
        for (Index i = a.chunk.row; i < a.chunk.row + a.chunk.rows; ++i) {
            const RowPlace at{b, h, i};
            const Index in_region = region_row(a, at);
            const bool q = a.bad_q[in_region] != 0, dout = a.bad_dout[in_region] != 0;
            if (!(q || dout) || !Row(p, at).attends(p, j)) continue;
            const Index r = row_at(a, b, h, i);
            const auto weight = [&](const void* matrix) -> Acc {
                return widen(reinterpret_cast<const T*>(static_cast<const Acc*>(matrix) + r * a.ld)[n]);
            };
            if (q)
                add_bad_row<T, Acc>(row_of<Acc>(a.dk, b, j, kv_head), weight(a.gradients),
                                    row_of<const T>(p.q, b, i, h), p.q.dim, p.head_dim);
            if (dout)
                add_bad_row<T, Acc>(row_of<Acc>(a.dv, b, j, kv_head), weight(a.scores),
                                    row_of<const T>(a.problem.dout, b, i, h), a.problem.dout.dim,
                                    p.value_dim);
        }
    }
}

// A warp for each row and each key of the chunk, after its products. Where nothing was bad it has nothing to
// do.
template <class T, class Acc>
__global__ void __launch_bounds__(kBackwardBlock) repair(const __grid_constant__ BackwardArgs a) {
    const Index rows = chunk_rows(a), group = a.problem.forward.group;
    const Index r = warp_number(), n = r - rows;
    if (r < rows) {
        const RowPlace at = place_of_row(a, r);
        if (a.any_bad_k[region_pair(a, at.b, quotient(at.h, group))] != 0) repair_query<T, Acc>(a, r, at);
        return;
    }
    if (n >= a.chunk.batches * a.chunk.kv_heads * a.chunk.keys) return;
    const Index pair = quotient(n, a.chunk.keys), entry = quotient(pair, a.chunk.kv_heads);
    const Index b = a.chunk.batch + entry, kv_head = a.chunk.kv_head + pair - entry * a.chunk.kv_heads;
    bool any = false;
    for (Index g = 0; g < group; ++g) {
        const Index head = region_pair(a, b, kv_head) * group + g;
        any |= a.any_bad_q[head] != 0 || a.any_bad_dout[head] != 0;
    }
    if (any) repair_key<T, Acc>(a, b, kv_head, n - pair * a.chunk.keys);
}

// ---- dbias, dalibi_slopes, dsinks -------------------------------------------------------------------------
// A block adds up what the chunk has for 32 neighbours of the key axis, a warp taking every eighth row; or,
// where keys are summed over, for one element.
template <class Acc>
__global__ void __launch_bounds__(kBackwardBlock) bias_sums(const __grid_constant__ BackwardArgs a) {
    const Chunk& c = a.chunk;
    const ScoreOperand& to = a.bias_sums;
    const Index first_head = c.kv_head * a.problem.forward.group,
                heads = c.kv_heads * a.problem.forward.group;
    const Index own_heads = to.head == 0 ? 1 : heads, own_rows = to.query == 0 ? 1 : c.rows;
    const Index tiles = to.key == 0 ? 1 : quotient(c.keys + 31, 32);
    const Index of_row = quotient(Index{blockIdx.x}, tiles), tile = Index{blockIdx.x} - of_row * tiles;
    const Index of_head = quotient(of_row, own_rows), of_batch = quotient(of_head, own_heads);
    const Index b = c.batch + of_batch, h = first_head + of_head - of_batch * own_heads,
                i = c.row + of_row - of_head * own_rows;
    const Index sum_rows = to.query == 0 ? c.rows : 1, sum_heads = to.head == 0 ? heads : 1,
                sum_batches = to.batch == 0 ? c.batches : 1;
    const Index warp = threadIdx.x / 32, lane = warp_lane_of();
    const Index key = tile * 32 + lane, end = to.key == 0 ? c.keys : (key < c.keys ? key + 1 : key);
    const auto* gradients = static_cast<const Acc*>(a.bias_gradients);
    double sum = 0;
    for (Index n = warp; n < sum_batches * sum_heads * sum_rows; n += kBackwardWarps) {
        const Index bh = quotient(n, sum_rows), bb = quotient(bh, sum_heads);
        const Acc* row = gradients + row_at(a, b + bb, h + bh - bb * sum_heads, i + n - bh * sum_rows) * a.ld;
        for (Index m = key; m < end; m += 32) sum += static_cast<double>(row[m]);
    }
    __shared__ double partial[kBackwardWarps][32];
    partial[warp][lane] = sum;
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < kBackwardWarps; ++w) sum += partial[w][lane];
    if (to.key == 0) {
        sum = Group<32>::reduce(sum, [](double s, double t) { return s + t; });
        if (lane != 0) return;
    } else if (key >= c.keys) {
        return;
    }
    const Index at = b * to.batch + h * to.head + i * to.query + (c.key + key) * to.key;
    if (a.bias_whole) return store_real(to.data, to.dtype, at, sum);
    Acc& total = static_cast<Acc*>(to.data)[at];
    total = static_cast<Acc>(static_cast<double>(total) + sum);
}

// A block for each query head of the region.
template <class Acc>
__global__ void __launch_bounds__(kBackwardBlock) head_sums(const __grid_constant__ BackwardArgs a) {
    const Index heads = a.region.kv_heads * a.problem.forward.group;
    const Index h = a.region.kv_head * a.problem.forward.group + Index{blockIdx.x};
    const auto add = [](double s, double t) { return s + t; };
    for (Index b = 0; b < a.region.batches; ++b) {
        const Index first = (b * heads + Index{blockIdx.x}) * a.region.rows;
        double slope = 0, sink = 0;
        for (Index i = threadIdx.x; i < a.region.rows; i += kBackwardBlock) {
            if (a.slope_sums != nullptr)
                slope -= static_cast<double>(static_cast<const Acc*>(a.slopes)[first + i]);
            if (a.sink_sums != nullptr) {
                const RowState<Acc>& state = static_cast<const RowState<Acc>*>(a.states)[first + i];
                if (state.sink != Acc(0))
                    sink -= static_cast<double>(state.sink) * static_cast<double>(state.delta);
            }
        }
        slope = Group<kBackwardBlock>::reduce(slope, add);
        sink = Group<kBackwardBlock>::reduce(sink, add);
        if (threadIdx.x != 0) continue;
        const Index batch = a.problem.dalibi.batch == 0 ? 0 : a.region.batch + b;
        if (a.slope_sums != nullptr) a.slope_sums[batch * a.problem.forward.q_heads + h] += slope;
        if (a.sink_sums != nullptr) a.sink_sums[h] += sink;
    }
}

// ---- results ----------------------------------------------------------------------------------------------
// A warp for each row.
template <class T, class Acc>
__global__ void __launch_bounds__(kBackwardBlock) store_rows(const __grid_constant__ StoreArgs a) {
    const Index r = warp_number();
    if (r >= a.batches * a.heads * a.rows) return;
    const Index bh = quotient(r, a.rows), b = quotient(bh, a.heads), h = bh - b * a.heads,
                s = r - bh * a.rows;
    const bool summed = s >= a.begin && s < a.end;
    const Acc unit = a.states == nullptr ? Acc(1) : static_cast<const RowState<Acc>*>(a.states)[r].unit;
    const Acc factor = to_finite<Acc>(a.factor);
    const Acc* source = row_of<const Acc>(a.source, b, s, h);
    T* target = row_of<T>(a.target, b, s, h);
    for (Index d = warp_lane_of(); d < a.dims; d += 32)
        narrow(summed ? source[d] * unit * factor : Acc(0), target[d * a.target.dim]);
}

__global__ void __launch_bounds__(kBackwardBlock) store_bias(const __grid_constant__ StoreBiasArgs a) {
    const Index n = Index{blockIdx.x} * kBackwardBlock + threadIdx.x;
    if (n >= a.size[0] * a.size[1] * a.size[2] * a.size[3]) return;
    const Index bhi = quotient(n, a.size[3]), bh = quotient(bhi, a.size[2]), b = quotient(bh, a.size[1]);
    const Index at[4] = {a.first[0] + b, a.first[1] + bh - b * a.size[1], a.first[2] + bhi - bh * a.size[2],
                         a.first[3] + n - bhi * a.size[3]};
    const auto offset = [&](const ScoreOperand& x) {
        return at[0] * x.batch + at[1] * x.head + at[2] * x.query + at[3] * x.key;
    };
    const double sum = a.sums.data == nullptr ? 0.0 : load_real(a.sums.data, a.sums.dtype, offset(a.sums));
    store_real(a.target.data, a.target.dtype, offset(a.target), sum);
}

__global__ void __launch_bounds__(kBackwardBlock) store_heads(const __grid_constant__ StoreHeadsArgs a) {
    const Index n = Index{blockIdx.x} * kBackwardBlock + threadIdx.x;
    const Index b = quotient(n, a.heads), h = n - b * a.heads;
    if (a.slope_sums != nullptr && b < a.batches)
        store_real(a.dalibi.data, a.dalibi.dtype, b * a.dalibi.batch + h * a.dalibi.head, a.slope_sums[n]);
    if (a.sink_sums != nullptr && b == 0)
        store_real(a.dsinks.data, a.dsinks.dtype, h * a.dsinks.head, a.sink_sums[h]);
}

__global__ void __launch_bounds__(kBackwardBlock) zero(const __grid_constant__ ZeroArgs a) {
    const Index n = Index{blockIdx.x} * kBackwardBlock + threadIdx.x;
    if (n * 16 < a.bytes) static_cast<Quad<float>*>(a.data)[n] = Quad<float>{};
}

}  // namespace
}  // namespace fastattn::cuda
