// Rows of a fused kernel's output that hold NaN or Inf, once more and key by key: see simt/restore.h for why.
// Here the weights are gone, so a warp computes the whole row again, in three passes over its keys: maximum,
// sum, weighted values.
#pragma once

#include "core/keys.h"
#include "cuda/fused/arguments.h"
#include "cuda/simt/row.h"

namespace fastattn::cuda {
namespace {

inline constexpr int kRecomputeBlock = 128;  // threads, a warp for each row
inline constexpr int kRecomputeDims = 256;  // Dv at most

template <class T>
class RecomputedRow {
public:
    __device__ RecomputedRow(const AttentionProblem& problem, const RowPlace& place)
        : p(problem),
          row(problem, place),
          keys{0, 0, 0, 0, 0, 0, row.range.begin, row.range.end - row.range.begin},
          score(problem, keys, row),
          q(static_cast<const T*>(p.q.data) + place.b * p.q.batch + place.i * p.q.seq + place.h * p.q.head),
          k(p.k, place.b, place.h / p.group),
          v(p.v, place.b, place.h / p.group),
          lane(static_cast<int>(threadIdx.x) % 32) {}

    __device__ void compute(T* out) {
        float m = -infinity<float>();
        bool attended = false;
        for (Index n = lane; n < keys.keys; n += 32) {
            m = larger(m, x_of(n));
            attended = attended || row.attends(p, keys.key + n);
        }
        for (int step = 16; step > 0; step /= 2) m = larger(m, __shfl_xor_sync(0xFFFFFFFFu, m, step));
        attended = __any_sync(0xFFFFFFFFu, attended);
        const float shift = m == -infinity<float>() ? 0.0f : m;
        float l = 0;
        for (Index n = lane; n < keys.keys; n += 32) l += power2(x_of(n) - shift);
        for (int step = 16; step > 0; step /= 2) l += __shfl_xor_sync(0xFFFFFFFFu, l, step);
        const Denominator<float> denominator(p, row, m, l);
        if (lane == 0 && p.lse.data != nullptr)
            static_cast<float*>(p.lse.data)[row.offset(p.lse)] = static_cast<float>(denominator.log_sum());

        float sum[kRecomputeDims / 32] = {};
        for (Index first = 0; first < keys.keys; first += 32) {
            const Index mine = first + lane;
            const bool attends = mine < keys.keys && row.attends(p, keys.key + mine);
            float weight = attends ? power2(x_of(mine) - shift) : 0.0f;
            if (attends && is_dropped(keys.key + mine)) weight = 0;
            T rounded;
            narrow(weight, rounded);
            for (int other = 0; other < 32 && first + other < keys.keys; ++other) {
                const float w = __shfl_sync(0xFFFFFFFFu, widen(rounded), other);
                const bool counts = __shfl_sync(0xFFFFFFFFu, static_cast<int>(attends), other) != 0;
                if (!counts) continue;  // the same in all lanes
                const T* values = v[keys.key + first + other];
                for (int n = 0; lane + 32 * n < p.value_dim; ++n)
                    sum[n] += w * widen(values[(lane + 32 * n) * v.number_stride()]);
            }
        }
        const float scale = denominator.factor / static_cast<float>(1.0 - p.dropout);
        for (int n = 0; lane + 32 * n < p.value_dim; ++n)
            narrow(attended ? sum[n] * scale : 0.0f, out[(lane + 32 * n) * p.out.dim]);
    }

private:
    __device__ float x_of(Index n) const {
        const T* key = k[keys.key + n];
        float dot = 0;
        for (Index d = 0; d < p.head_dim; ++d)
            dot += widen(q[d * p.q.dim]) * widen(key[d * k.number_stride()]);
        return score(static_cast<int>(n), dot);
    }

    __device__ bool is_dropped(Index j) const {
        if (p.dropout == 0) return false;
        const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
        const PhiloxBlock random =
            philox4x32(word(j / 4), word(row.place.i), word(row.place.h), word(row.place.b), p.seed);
        return random.word[j % 4] < dropout_threshold(p.dropout);
    }

    const AttentionProblem& p;
    const Row row;
    const Chunk keys;  // the row's own
    const Scorer<float, false> score;
    const T* q;
    const KeyRows<T> k, v;
    const int lane;
};

template <class T>
__global__ void __launch_bounds__(kRecomputeBlock) recompute_rows(const __grid_constant__ FlashArgs a) {
    const AttentionProblem& p = a.problem;
    const Index heads = a.region.kv_heads * p.group;
    const Index r = Index{blockIdx.x} * (kRecomputeBlock / 32) + threadIdx.x / 32;
    const Index bh = quotient(r, a.region.rows), entry = quotient(bh, heads);
    if (entry >= a.region.batches) return;
    const RowPlace at{a.region.batch + entry, a.region.kv_head * p.group + (bh - entry * heads),
                      a.region.row + (r - bh * a.region.rows)};
    T* out = static_cast<T*>(p.out.data) + at.b * p.out.batch + at.i * p.out.seq + at.h * p.out.head;
    bool odd = false;
    for (Index d = threadIdx.x % 32; d < p.value_dim; d += 32) {
        const float x = widen(out[d * p.out.dim]);
        odd = odd || !(x - x == 0.0f);
    }
    if (__any_sync(0xFFFFFFFFu, odd)) RecomputedRow<T>(p, at).compute(out);
}

}  // namespace
}  // namespace fastattn::cuda
