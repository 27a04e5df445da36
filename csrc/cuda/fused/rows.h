// What the fused kernels share: which rows and keys a block of threads works on, and the online softmax of
// the rows of a warp (Milakov and Gimelshein 2018; as in FlashAttention-2, Dao, ICLR 2024):
//
//   S = q k^T (rows, keys), x = log2(e) * score(S), m' = max(m, rows' max of x), a = 2^(m - m')
//   P = 2^(x - m') in 16 bits, l = l a + sum P, O = O a + P v; in the end out = O/l, lse = ln 2 (m + log2 l)
//
// S, P and O lie in registers as the accumulators of mma.m16n8 and of wgmma do. In a tile of 16 rows, with g
// = lane / 4 and t = lane % 4, element e of the j-th eight columns is row g + 8 * (e / 2), column 8 j + 2 t +
// e % 2.
#pragma once

#include "cuda/fused/arguments.h"
#include "cuda/fused/tensor_core.h"
#include "cuda/simt/row.h"

namespace fastattn::cuda {
namespace {

// Consecutive rows of one kv head. Row r of a kv head is query r / G of its head r % G, so that K and V are
// read once for the whole group.
struct RowBlock {
    // Rows first_row .. first_row + most of kv head `pair` (batch entry outside) of the region.
    __device__ RowBlock(const FlashArgs& a, Index pair, Index first_row_, int most)
        : p(a.problem), first_row(first_row_), region_row(a.region.row) {
        rows = static_cast<int>(clamped(a.region.rows * p.group - first_row, 0, most));
        const Index entry = quotient(pair, a.region.kv_heads);
        b = a.region.batch + entry;
        kv_head = a.region.kv_head + (pair - entry * a.region.kv_heads);
        find_keys();
    }

    __device__ __forceinline__ RowPlace place(int local) const {
        const Index row = first_row + (local < rows ? local : rows - 1);
        const Index i = quotient(row, p.group);
        return {b, kv_head * p.group + (row - i * p.group), region_row + i};
    }

    // Of its keys those from `begin` on and before `end`, a multiple of 8 the first.
    __device__ __forceinline__ void restrict_keys(Index begin, Index end) {
        key_begin = clamped(key_begin, begin, end);
        key_end = clamped(key_end, begin, end);
    }

    const AttentionProblem& p;
    Index first_row, region_row, b, kv_head;
    int rows;  // that are there
    Index key_begin, key_end;  // of all rows; begin a multiple of 8

private:
    // Rows that do not exist come last.
    __device__ void find_keys() {
        const Index q_len = length_of(p.q_lens, p.has_q_lens, b, p.q_size);
        const Index existing = clamped((q_len - region_row) * p.group - first_row, 0, rows);
        key_begin = key_end = 0;
        if (existing == 0) return;
        const KeyRange keys =
            range_of_rows(Row(p, place(0)).range, Row(p, place(static_cast<int>(existing) - 1)).range);
        if (keys.begin >= keys.end) return;  // begin, rounded, could be before an end of nobody
        key_begin = keys.begin - keys.begin % 8;
        key_end = keys.end;
    }
};

// ---- the end of a row -------------------------------------------------------------------------------------
// What its sum of weighted values has to be multiplied by, where m = max x and l = sum 2^(x - m); the lse is
// stored on the way.
__device__ __forceinline__ float finish_row(const AttentionProblem& p, const Row& row, float m, float l,
                                            bool stores_lse) {
    const Denominator<float> denominator(p, row, m, l);
    if (stores_lse && p.lse.data != nullptr)
        static_cast<float*>(p.lse.data)[row.offset(p.lse)] = static_cast<float>(denominator.log_sum());
    // A row without keys is 0; one whose keys have no weight is NaN, or found by recompute_rows to have none.
    const bool empty = row.range.begin >= row.range.end;
    return empty ? 0.0f : denominator.factor / static_cast<float>(1.0 - p.dropout);
}

// Features d and d + 1 of the result, d even.
template <class T>
__device__ __forceinline__ void store_pair(const AttentionProblem& p, const RowPlace& at, int d, float low,
                                           float high) {
    T* out = static_cast<T*>(p.out.data) + at.b * p.out.batch + at.i * p.out.seq + at.h * p.out.head;
    *reinterpret_cast<std::uint32_t*>(out + d) = pack<T>(low, high);
}

// m is the maximum so far, and all exponentials are the exponential unit's.
struct ExactSoftmax {
    static constexpr float slack = 0;
    static constexpr int polynomial = 0;
};
// m stays while the maximum is above it by at most 8, so weights are up to 2^8, which float16 can bear: the
// output is rescaled rarely, and most warps skip it (FlashAttention-4). One in `polynomial` exponentials is a
// polynomial's: at head dimension 64 the unit takes as long as the tensor cores do.
template <int polynomial_>
struct LazySoftmax {
    static constexpr float slack = 8;
    static constexpr int polynomial = polynomial_;  // every so many-th eight columns; 0: none
};

// Two neighbouring tiles of eight keys of the weights, in 16 bits, as the left operand of a product with
// values.
template <class T>
__device__ __forceinline__ void pack_weights(const float (&low)[4], const float (&high)[4],
                                             std::uint32_t (&to)[4]) {
    to[0] = pack<T>(low[0], low[1]);
    to[1] = pack<T>(low[2], low[3]);
    to[2] = pack<T>(high[0], high[1]);
    to[3] = pack<T>(high[2], high[3]);
}

// A thread's share of 16 * mt rows of a block: their maxima, sums and outputs of 8 * dt features.
//   plain: scale, lengths, causal and window only, and a scale above 0 (is_plain_flash)
//   Softmax: how, of the above
// The block is a variable beside this object, not in one object with it: an object that holds its own address
// stays in local memory as a whole, the outputs too.
template <class T, int mt, int nt, int dt, bool plain, class Softmax = ExactSoftmax>
class FlashRows {
public:
    static constexpr int kRows = 2 * mt;  // g and g + 8 of each 16 rows

    __device__ FlashRows(const RowBlock& rows_of_block, int first_local)
        : block(rows_of_block),
          p(rows_of_block.p),
          first(first_local),
          g(static_cast<int>(threadIdx.x) % 32 / 4),
          t(static_cast<int>(threadIdx.x) % 4) {
        const Index keys = block.key_end - block.key_begin;
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const Row row(p, block.place(local_row(r)));
            begin[r] = static_cast<int>(clamped(row.range.begin - block.key_begin, 0, keys));
            end[r] = static_cast<int>(clamped(row.range.end - block.key_begin, 0, keys));
            m[r] = -infinity<float>();
            l[r] = 0;
        }
        FASTATTN_UNROLL
        for (int i = 0; i < mt; ++i) {
            FASTATTN_UNROLL
            for (int d = 0; d < dt; ++d) {
                FASTATTN_UNROLL
                for (int e = 0; e < 4; ++e) o[i][d][e] = 0;
            }
        }
    }

    __device__ __forceinline__ int local_row(int r) const { return first + r / 2 * 16 + g + 8 * (r % 2); }

    // Products with the keys from `offset` on become weights; `factor` is what the output so far has to be
    // multiplied by. The offset counts from key_begin, may be negative, and is a multiple of 8.
    __device__ __forceinline__ void to_weights(int offset, float (&s)[mt][nt][4], float (&factor)[kRows]) {
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float scale = 1, peak = -infinity<float>();
            if constexpr (plain) {
                scale = to_finite<float>(p.scale * kLog2E);
                if (!sees_all(begin[r], end[r], offset, 8 * nt)) {
                    FASTATTN_UNROLL
                    for (int j = 0; j < nt; ++j) {
                        FASTATTN_UNROLL
                        for (int e = 0; e < 2; ++e) {
                            const int key = offset + 8 * j + 2 * t + e;
                            if (!sees_key(begin[r], end[r], key))
                                s[r / 2][j][2 * (r % 2) + e] = -infinity<float>();
                        }
                    }
                }
            } else {
                to_scores(offset, r, s);
            }
            FASTATTN_UNROLL
            for (int j = 0; j < nt; ++j) {
                FASTATTN_UNROLL
                for (int e = 0; e < 2; ++e) peak = larger(peak, s[r / 2][j][2 * (r % 2) + e]);
            }
            // The four threads of a row.
            peak = larger(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
            peak = larger(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 2));
            peak = larger(m[r], times(peak, scale));
            if constexpr (Softmax::slack > 0) {
                if (plus(peak, -m[r]) <= Softmax::slack) peak = m[r];  // a sum m + slack may be rounded up
            }
            const float shift = peak == -infinity<float>() ? 0.0f : peak;
            factor[r] = m[r] == -infinity<float>() ? 0.0f : power2(m[r] - shift);
            m[r] = peak;
            float sum = 0;
            const auto to_powers = [&](auto shifted) {
                FASTATTN_UNROLL
                for (int j = 0; j < nt; ++j) {
                    FASTATTN_UNROLL
                    for (int e = 0; e < 2; ++e) {
                        float& x = s[r / 2][j][2 * (r % 2) + e];
                        x = by_polynomial(j) ? power2_by_polynomial(shifted(x)) : power2(shifted(x));
                        sum += x;
                    }
                }
            };
            // One FMA scales and shifts; but m is rounded and the product in an FMA is not, and of large
            // scores their difference is no longer small.
            if (plain && fabsf(shift) < 1048576.0f) {
                to_powers([&](float x) { return fused(x, scale, -shift); });
            } else {
                to_powers([&](float x) { return plus(times(x, scale), -shift); });
            }
            l[r] = l[r] * factor[r] + sum;  // this thread's part; the four are added at the end
            if constexpr (!plain) {
                if (p.dropout > 0) drop(offset, r, s);
            }
        }
    }

    __device__ __forceinline__ void rescale(const float (&factor)[kRows]) {
        if constexpr (Softmax::slack > 0) {
            bool changes = false;
            FASTATTN_UNROLL
            for (int r = 0; r < kRows; ++r) changes = changes || factor[r] != 1.0f;
            if (!__any_sync(0xFFFFFFFFu, changes)) return;
        }
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            FASTATTN_UNROLL
            for (int d = 0; d < dt; ++d) {
                o[r / 2][d][2 * (r % 2)] *= factor[r];
                o[r / 2][d][2 * (r % 2) + 1] *= factor[r];
            }
        }
    }

    // The four threads of a row have parts of its sum until then.
    __device__ void finish_sums() {
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            l[r] += __shfl_xor_sync(0xFFFFFFFFu, l[r], 1);
            l[r] += __shfl_xor_sync(0xFFFFFFFFu, l[r], 2);
        }
    }

    // After finish_sums().
    __device__ void store() {
        FASTATTN_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const int local = local_row(r);
            if (local >= block.rows) continue;
            const Row row(p, block.place(local));
            const float scale = finish_row(p, row, m[r], l[r], t == 0);
            FASTATTN_UNROLL
            for (int d = 0; d < dt; ++d) {
                if (8 * d >= p.value_dim) continue;
                const float* from = o[r / 2][d] + 2 * (r % 2);
                store_pair<T>(p, row.place, 8 * d + 2 * t, from[0] * scale, from[1] * scale);
            }
        }
    }

    const RowBlock& block;
    const AttentionProblem& p;
    const int first, g, t;
    int begin[kRows], end[kRows];  // of this thread's rows, from key_begin on
    float m[kRows], l[kRows];
    float o[mt][dt][4];

private:
    // Row r of the products becomes x. What Scorer does element by element is done operation by operation:
    // each is asked for once, and its loop unrolled, so that s stays in registers.
    __device__ __forceinline__ void to_scores(int offset, int r, float (&s)[mt][nt][4]) {
        const Row row(p, block.place(local_row(r)));
        Chunk keys;
        keys.key = block.key_begin;
        keys.keys = block.key_end - block.key_begin;
        const Scorer<float, false> score(p, keys, row);
        const int mine = offset + 2 * t;
        const auto each = [&](auto f) {
            FASTATTN_UNROLL
            for (int j = 0; j < nt; ++j) {
                FASTATTN_UNROLL
                for (int e = 0; e < 2; ++e) f(mine + 8 * j + e, s[r / 2][j][2 * (r % 2) + e]);
            }
        };
        const auto attends = [&](int v) { return sees_key(begin[r], end[r], v); };
        each([&](int, float& x) { x = times(x, score.scale); });
        if (score.elementwise) {
            if (score.modifies()) {
                each([&](int, float& x) {
                    float derivative;
                    x = score.modified(x, derivative);
                });
            }
            if (p.alibi_slopes.data != nullptr) {
                // From this thread's first key; in float, as is what comes of it.
                const float from_mine =
                    static_cast<float>(score.position - static_cast<double>(score.first + mine));
                each([&](int v, float& x) {
                    x = score.with_alibi(x, fabsf(from_mine - static_cast<float>(v - mine)));
                });
            }
            if (p.bias.data != nullptr) {
                score.template with_bias_type<T>([&](auto bias_of) {
                    each([&](int v, float& x) {
                        if (attends(v)) x = score.with_bias(x, bias_of(v));
                    });
                });
            }
            each([&](int, float& x) { x = score.limited(x); });
            if (p.mask.data != nullptr) {
                each([&](int v, float& x) {
                    if (attends(v) && score.is_masked(v)) x = -infinity<float>();
                });
            }
        }
        each([&](int v, float& x) {
            if (!attends(v)) x = -infinity<float>();
        });
    }

    static __device__ constexpr bool by_polynomial(int j) {
        if constexpr (Softmax::polynomial > 0) return j % Softmax::polynomial == 0;
        return false;
    }

    // A block of the generator has the words of four keys, which two neighbouring threads share: of two
    // blocks of theirs each computes one.
    __device__ __forceinline__ void drop(int offset, int r, float (&s)[mt][nt][4]) {
        const RowPlace at = block.place(local_row(r));
        const std::uint32_t threshold = dropout_threshold(p.dropout);
        const auto word = [](Index n) { return static_cast<std::uint32_t>(n); };
        const bool odd = t % 2 != 0;
        static_assert(nt % 2 == 0);
        FASTATTN_UNROLL
        for (int j = 0; j < nt; j += 2) {
            // A multiple of 4, as the tile begins at a multiple of 8.
            const Index key = block.key_begin + offset + 8 * (j + t % 2) + t / 2 * 4;
            const PhiloxBlock random = philox4x32(word(key / 4), word(at.i), word(at.h), word(at.b), p.seed);
            std::uint32_t other[2];
            FASTATTN_UNROLL
            for (int e = 0; e < 2; ++e)
                other[e] = __shfl_xor_sync(0xFFFFFFFFu, odd ? random.word[e] : random.word[2 + e], 1);
            FASTATTN_UNROLL
            for (int e = 0; e < 2; ++e) {
                const std::uint32_t drawn = odd ? other[e] : random.word[e];
                const std::uint32_t drawn_next = odd ? random.word[2 + e] : other[e];
                if (drawn < threshold) s[r / 2][j][2 * (r % 2) + e] = 0;
                if (drawn_next < threshold) s[r / 2][j + 1][2 * (r % 2) + e] = 0;
            }
        }
    }
};

}  // namespace
}  // namespace fastattn::cuda
