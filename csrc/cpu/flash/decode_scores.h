// Decode: the scores of a block of keys, read where they lie.
#pragma once

#include "cpu/flash/decode_block.h"

namespace fastattn::cpu {
namespace {

// width vectors become one vector of their sums, in order. Depth first, so that few are alive.
template <class V, int step = 1>
FASTATTN_INLINE V reduce_each(const V (&r)[V::width], int first = 0) {
    if constexpr (requires { V::sum_each(r); }) {
        return V::sum_each(r);
    } else if constexpr (step == V::width) {
        return r[first];
    } else {
        const V a = reduce_each<V, 2 * step>(r, first), b = reduce_each<V, 2 * step>(r, first + step);
        return V::interleave_lo(a, b) + V::interleave_hi(a, b);
    }
}

// E: the engine, K: dtype of k.
template <class E, class K>
class DecodeScores {
    using V = typename E::V;
    using Acc = typename E::Acc;
    static constexpr int w = V::width;
    static constexpr std::int64_t block = kDecodeBlock;
    static constexpr std::int64_t kScoreKeys = 16;  // of a head at a time
    static constexpr int kSideBySide = w < 4 ? w : 4;  // keys, with one row for each head

public:
    DecodeScores(const AttentionProblem& p, const ItemRange& item, const ItemBuffers<E>& buffers,
                 const DecodeKeys<K>& k)
        : q_(buffers.q),
          scores_(buffers.scores),
          rows_(item.rows),
          heads_(item.heads),
          seq_(k.seq),
          head_(k.head),
          q_stride_(item.entry->plan.q_stride),
          head_dim_(p.head_dim),
          k_ahead_(decode_ahead(k.seq, p.head_dim * static_cast<std::int64_t>(sizeof(K)), item.heads)) {}

    // scores[r][0..n) = q_r . k_j for all rows and the n keys of the present block; next: what to prefetch
    // meanwhile.
    void of_block(const K* keys, std::int64_t n, RowPrefetch<false>& next) const {
        // has_tail: D is not a multiple of the width; code of its own, so that the sums stay in registers
        // without. The sums are the same to the last bit either way.
        if (head_dim_ % (w * E::scalars) == 0) {
            score<false>(keys, n, next);
        } else {
            score<true>(keys, n, next);
        }
    }

private:
    template <bool has_tail>
    void score(const K* keys, std::int64_t n, RowPrefetch<false>& next) const {
        if (rows_ == 1) {
            score_rows<has_tail>(keys, n);
        } else {
            score_block<has_tail>(keys, n, next);
        }
    }

    template <bool has_tail>
    void score_block(const K* block_begin, std::int64_t n, RowPrefetch<false>& next) const {
        for (std::int64_t begin = 0; begin < n; begin += kScoreKeys) {
            const std::int64_t end = n - begin < kScoreKeys ? n : begin + kScoreKeys;
            for (std::int64_t h = 0; h < heads_; ++h) {
                const K* keys_begin = block_begin + h * head_;
                const std::int64_t first = h * rows_;
                for_row_tiles<V>(first, rows_, [&](std::int64_t r, auto rows) {
                    constexpr int heads = decltype(rows)::value, keys = w / heads;
                    for (std::int64_t c = begin; c < end; c += keys) {
                        if (r == first) next.advance(keys);
                        const K* k[keys];
#pragma GCC unroll 16
                        for (int i = 0; i < keys; ++i) k[i] = keys_begin + (c + i < n ? c + i : n - 1) * seq_;
                        alignas(64) Acc sums[w];
                        dot_tile<heads, keys, has_tail>(q_ + r * q_stride_, k).store(sums);
                        for (int m = 0; m < heads; ++m)
                            std::memcpy(scores_ + (r + m) * block + c, sums + m * keys, keys * sizeof(Acc));
                    }
                });
            }
        }
    }

    // With one row for each head the products cost next to nothing, and the time is that of reading.
    // kSideBySide keys are read at once, all heads of these, then the next ones, each line prefetches one
    // further on: the pattern that comes nearest to what plain reading reaches.

    // scores[h][0..n) = q_h . k_jh for all heads, one row each
    template <bool has_tail>
    void score_rows(const K* block_begin, std::int64_t n) const {
        constexpr int groups = w / kSideBySide;
        const std::int64_t q_stride = q_stride_, tiled = heads_ / groups * groups;
        const auto key = [&](std::int64_t c) { return block_begin + (c < n ? c : n - 1) * seq_; };
        for (std::int64_t c = 0; c < n; c += kSideBySide) {
            const K* k[kSideBySide];
            for (int i = 0; i < kSideBySide; ++i) k[i] = key(c + i);
            for (std::int64_t h = 0; h < tiled; h += groups) {
                alignas(64) Acc sums[w];
                dot_groups<has_tail>(q_ + h * q_stride, q_stride, k, h * head_, head_).store(sums);
                for (int g = 0; g < groups; ++g)
                    std::memcpy(scores_ + (h + g) * block + c, sums + g * kSideBySide,
                                kSideBySide * sizeof(Acc));
            }
        }
        // The heads that are left over: more keys of one head instead.
        for (std::int64_t h = tiled; h < heads_; ++h) {
            const Acc* q = q_ + h * q_stride;
            Acc* scores = scores_ + h * block;
            std::int64_t c = 0;
            for (; c + w <= n; c += w) {
                const K* k[kSideBySide];
                for (int i = 0; i < kSideBySide; ++i) k[i] = key(c + i);
                dot_groups<has_tail>(q, 0, k, h * head_, kSideBySide * seq_).store(scores + c);
            }
            if (c == n) continue;
            const K* k[w];
            for (int i = 0; i < w; ++i) k[i] = key(c + i) + h * head_;
            dot_tile<1, w, has_tail>(q, k).store(scores + c);
        }
    }

    // dot_tile with a row of q for each group, and with prefetching; the order over u is the same, as bits
    // depend on it. Sums of width rows of k, kSideBySide in a group: group g begins at k[i] + first + g *
    // k_step, and is multiplied with q + g * q_step.
    template <bool has_tail>
    FASTATTN_INLINE V dot_groups(const Acc* q, std::int64_t q_step, const K* const (&k)[kSideBySide],
                                 std::int64_t first, std::int64_t k_step) const {
        constexpr std::int64_t line = kLineBytes / static_cast<int>(sizeof(K)) / E::scalars;
        V acc[w];
#pragma GCC unroll 16
        for (int g = 0; g < w; g += kSideBySide) {
#pragma GCC unroll 4
            for (int i = 0; i < kSideBySide; ++i) acc[g + i] = V::zero();
            std::int64_t u = 0;
            for (; (u + w) * E::scalars <= head_dim_; u += w) {
                const V x = V::load(q + u);
#pragma GCC unroll 4
                for (int i = 0; i < kSideBySide; ++i) {
                    acc[g + i] = E::mma(x, E::load_whole(k[i] + first, u), acc[g + i]);
                    if (line <= w || u % line == 0) fetch_line(k[i] + first + u * E::scalars + k_ahead_);
                }
            }
            if constexpr (has_tail) {
                const V x = V::load(q + u);
#pragma GCC unroll 4
                for (int i = 0; i < kSideBySide; ++i) {
                    acc[g + i] = E::mma(x, E::load_units(k[i] + first, 1, u, head_dim_), acc[g + i]);
                    fetch_line(k[i] + first + u * E::scalars + k_ahead_);
                }
            }
            q += q_step;
            first += k_step;
        }
        return reduce_each(acc);
    }

    // Sums of `heads` rows of q with `keys` rows of k, heads-major; heads * keys = width.
    template <int heads, int keys, bool has_tail>
    FASTATTN_INLINE V dot_tile(const Acc* q, const K* const (&k)[keys]) const {
        V acc[w];
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) acc[i] = V::zero();
        auto step = [&](std::int64_t u, auto load_key) {
            V qs[heads];
#pragma GCC unroll 4
            for (int h = 0; h < heads; ++h) qs[h] = V::load(q + h * q_stride_ + u);
#pragma GCC unroll 16
            for (int i = 0; i < keys; ++i) {
                const V x = load_key(k[i], u);
#pragma GCC unroll 4
                for (int h = 0; h < heads; ++h) acc[h * keys + i] = E::mma(qs[h], x, acc[h * keys + i]);
            }
        };
        std::int64_t u = 0;
        for (; (u + w) * E::scalars <= head_dim_; u += w)
            step(u, [](const K* x, std::int64_t at) { return E::load_whole(x, at); });
        if constexpr (has_tail)
            step(u, [&](const K* x, std::int64_t at) { return E::load_units(x, 1, at, head_dim_); });
        return reduce_each(acc);
    }

    const typename E::Unit* const q_;
    Acc* const scores_;
    const std::int64_t rows_, heads_, seq_, head_, q_stride_, head_dim_, k_ahead_;
};

}  // namespace
}  // namespace fastattn::cpu
