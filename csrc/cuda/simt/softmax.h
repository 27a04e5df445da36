// Scores of a chunk -> weights in their place, lse, and the weights that the caller asked for.
//
//   x_j = log2(e) * score_j,  m = max x_j,  l = sum_j 2^(x_j - m) + 2^(sink - m)
//   P_j = keep_j * 2^(x_j - m) / l * weight_scale,   lse = ln 2 * (m + log2 l)
//
// A group of threads owns a row. Without elementwise arguments up to 32 scores per thread stay in registers,
// so the row is read once; otherwise three times (maximum, sum, weights), with x in place of the products
// from the first on. Both ways do the same operations in the same order: what else is asked for does not
// change the result. The 16-bit weights of a row are written over the first half of its f32 scores.
#pragma once

#include "cuda/simt/row.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kSoftmaxBlock = 256;  // threads
inline constexpr int kQuads = 8;  // of scores that a thread keeps

template <class T, class Acc, int threads, bool plain>
class SoftmaxRow {
public:
    using G = Group<threads>;
    static constexpr int kStep = 4 * threads;  // keys that the group takes at once

    __device__ SoftmaxRow(const SoftmaxArgs& args, Index r)
        : a(args),
          p(args.problem),
          number(r),
          row(args.problem, place_of_row(args, r)),
          score(args.problem, args.chunk, row),
          keys(static_cast<int>(args.chunk.keys)),
          scores(static_cast<Acc*>(args.scores) + r * args.ld),
          weights(reinterpret_cast<T*>(scores)) {}

    __device__ void compute() {
        if (plain && keys <= kStep * kQuads) {
            in_registers();
        } else {
            in_three_passes();
        }
        finish();
    }

private:
    static __device__ __forceinline__ Acc shift_of(Acc m) { return m == -infinity<Acc>() ? Acc(0) : m; }

    __device__ __forceinline__ Quad<Acc> load(int v) const {
        return *reinterpret_cast<const Quad<Acc>*>(scores + v);
    }

    __device__ __forceinline__ void load_scores(int v, Acc (&x)[4]) const {
        const Quad<Acc> raw = load(v);
        FASTATTN_UNROLL
        for (int e = 0; e < 4; ++e) x[e] = score(v + e, raw.at[e]);
    }

    __device__ void in_registers() {
        Acc x[kQuads][4];
        Acc top = -infinity<Acc>();
        FASTATTN_UNROLL
        for (int c = 0; c < kQuads; ++c) {
            const int v = c * kStep + 4 * G::lane();
            if (v >= keys) continue;
            load_scores(v, x[c]);
            FASTATTN_UNROLL
            for (int e = 0; e < 4; ++e) top = larger(top, x[c][e]);
        }
        m = G::reduce(top, [](Acc s, Acc t) { return larger(s, t); });
        const Acc shift = shift_of(m);
        Acc sum = 0;
        FASTATTN_UNROLL
        for (int c = 0; c < kQuads; ++c) {
            if (c * kStep + 4 * G::lane() >= keys) continue;
            FASTATTN_UNROLL
            for (int e = 0; e < 4; ++e) sum += x[c][e] = power2(x[c][e] - shift);
        }
        set_total(sum);
        G::sync();  // all threads have read their scores
        if (!regular) return store_irregular(a, number);
        FASTATTN_UNROLL
        for (int c = 0; c < kQuads; ++c) {
            const int v = c * kStep + 4 * G::lane();
            if (v < keys) store(v, x[c]);
        }
    }

    // x of keys v.. in the second and third pass.
    __device__ __forceinline__ void load_again(int v, Acc (&x)[4]) const {
        if constexpr (plain) {
            load_scores(v, x);
        } else {
            const Quad<Acc> done = load(v);
            FASTATTN_UNROLL
            for (int e = 0; e < 4; ++e) x[e] = done.at[e];
        }
    }

    __device__ void in_three_passes() {
        Acc top = -infinity<Acc>();
        for (int v = 4 * G::lane(); v < keys; v += kStep) {
            Acc x[4];
            load_scores(v, x);
            if constexpr (!plain) *reinterpret_cast<Quad<Acc>*>(scores + v) = {{x[0], x[1], x[2], x[3]}};
            FASTATTN_UNROLL
            for (int e = 0; e < 4; ++e) top = larger(top, x[e]);
        }
        m = G::reduce(top, [](Acc s, Acc t) { return larger(s, t); });
        const Acc shift = shift_of(m);
        Acc sum = 0;
        for (int v = 4 * G::lane(); v < keys; v += kStep) {
            Acc x[4];
            load_again(v, x);
            FASTATTN_UNROLL
            for (int e = 0; e < 4; ++e) sum += power2(x[e] - shift);
        }
        set_total(sum);
        if (!regular) return store_irregular(a, number);
        // A step is read by all before its weights go over scores that were read in this step or before.
        for (int first = 0; first < keys; first += kStep) {
            const int v = first + 4 * G::lane();
            Acc x[4] = {};
            if (v < keys) {
                load_again(v, x);
                FASTATTN_UNROLL
                for (int e = 0; e < 4; ++e) x[e] = power2(x[e] - shift);
            }
            G::sync();
            if (v < keys) store(v, x);
        }
    }

    // l from the sums of the threads.
    __device__ void set_total(Acc sum) {
        l = G::reduce(sum, [](Acc s, Acc t) { return s + t; });
        const Denominator<Acc> denominator(p, row, m, l);
        regular = denominator.is_regular();
        inverse = denominator.factor;
        stored = inverse * static_cast<Acc>(weight_scale(p.dtype));
    }

    // e[0..3]: 2^(x - m) of keys v.. of the chunk.
    __device__ __forceinline__ void store(int v, const Acc (&e)[4]) {
        Quad<T> out;
        const Index j = a.chunk.key + v;
        PhiloxBlock random{};
        if (!plain && p.dropout > 0) {
            const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
            random = philox4x32(word(j / 4), word(row.place.i), word(row.place.h), word(row.place.b), p.seed);
        }
        FASTATTN_UNROLL
        for (int n = 0; n < 4; ++n) {
            Acc weight = e[n] * stored;
            if (!plain && p.dropout > 0 && random.word[n] < dropout_threshold(p.dropout)) weight = 0;
            narrow(weight, out.at[n]);
            if (!plain && p.weights.data != nullptr && v + n < keys) store_softmax(j + n, e[n] * inverse);
        }
        *reinterpret_cast<Quad<T>*>(weights + v) = out;
    }

    // l is 0 or NaN. Nothing attended: 0; else the formula's NaN, for the attended keys.
    __device__ static __noinline__ void store_irregular(const SoftmaxArgs& a, Index r) {
        const AttentionProblem& p = a.problem;
        const Row row(p, place_of_row(a, r));
        T* const weights = reinterpret_cast<T*>(static_cast<Acc*>(a.scores) + r * a.ld);
        for (Index v = G::lane(); v < a.chunk.keys; v += threads) {
            const Index j = a.chunk.key + v;
            const Acc weight = row.attends(p, j) ? static_cast<Acc>(NAN) : Acc(0);
            narrow(weight, weights[v]);
            if (!plain && p.weights.data != nullptr)
                static_cast<Acc*>(p.weights.data)[row.offset(p.weights) + j * p.weights.key] = weight;
        }
    }

    __device__ __forceinline__ void store_softmax(Index j, Acc x) const {
        static_cast<Acc*>(p.weights.data)[row.offset(p.weights) + j * p.weights.key] = x;
    }

    __device__ void finish() {
        if (G::lane() == 0 && p.lse.data != nullptr) {
            static_cast<Acc*>(p.lse.data)[row.offset(p.lse)] =
                static_cast<Acc>(Denominator<Acc>(p, row, m, l).log_sum());
        }
        if constexpr (!plain) {
            if (p.weights.data == nullptr) return;
            for (Index j = G::lane(); j < a.chunk.key; j += threads) store_softmax(j, 0);
            for (Index j = a.chunk.key + a.chunk.keys + G::lane(); j < p.kv_size; j += threads)
                store_softmax(j, 0);
        }
    }

    const SoftmaxArgs& a;
    const AttentionProblem& p;
    const Index number;  // of the row in the chunk
    const Row row;
    const Scorer<Acc, plain> score;
    const int keys;  // of the chunk
    Acc* scores;
    T* weights;
    Acc m = 0, l = 0;  // of the keys alone
    Acc inverse = 0, stored = 0;  // what 2^(x - m) is multiplied with for the softmax, and for weights
    bool regular = false;  // l > 0
};

// plain: scale, lengths, causal and window only, and no weights asked for.
template <class T, class Acc, int threads, bool plain>
__global__ void __launch_bounds__(kSoftmaxBlock) softmax_rows(const __grid_constant__ SoftmaxArgs a) {
    const Index rows = a.chunk.batches * a.chunk.kv_heads * a.problem.group * a.chunk.rows;
    const Index r = Index{blockIdx.x} * (kSoftmaxBlock / threads) + threadIdx.x / threads;
    if (r < rows) SoftmaxRow<T, Acc, threads, plain>(a, r).compute();
}

}  // namespace
}  // namespace fastattn::cuda
