// Decode: few query rows (Sq * G <= kDecodeRows), so that reading k and v is what takes the time. They
// are used where they lie, once per block of kDecodeBlock keys for all rows; while k of a block is read,
// v of it is prefetched, and while v is read, k of the next one.
//
//   q (R, D)   k, v rows in memory, any storage type   scores, p (R, kDecodeBlock)   O (R, Dv)
#pragma once

#include "cpu/flash_gemm.h"
#include "cpu/flash_item.h"
#include "cpu/flash_pack.h"

namespace fastattn::cpu {
namespace {

// width vectors become one vector of their sums, in order.
template <class V>
FASTATTN_INLINE V reduce_each(V (&r)[V::width]) {
#pragma GCC unroll 4
    for (int n = V::width / 2; n >= 1; n /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i) r[i] = V::interleave_lo(r[i], r[i + n]) + V::interleave_hi(r[i], r[i + n]);
    }
    return r[0];
}

FASTATTN_INLINE void prefetch_row(const void* row, std::int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p + b);
}

template <class E, class S>
class Decode {
    using V = typename E::V;
    using Acc = typename E::Acc;
    static constexpr int w = V::width;
    static constexpr std::int64_t block = kDecodeBlock;
    static constexpr int most_rows = w < 4 ? w : 4;  // rows of a register tile: 1, 2 or 4

public:
    Decode(const FlashCall& call, std::int64_t item, std::byte* workspace)
        : call_(call), p_(call.problem), item_(item_range(call, item)), x_(make_block<E>(p_, item_.batch)) {
        keys_ = start_item<E>(call, item_, item_.rows, workspace, x_, at_);
        k_ = row_pointer<const S>(p_.k, item_.batch, 0, item_.kv_head);
        v_ = row_pointer<const S>(p_.v, item_.batch, 0, item_.kv_head);
        for (std::int64_t r = 0; r < item_.rows; ++r) {
            const RowInfo& row = x_.info[r];
            pack_row<E>(at_.q + r * call_.plan.q_stride, row_pointer<const S>(p_.q, item_.batch, row.query, row.head),
                        p_.q.dim, p_.head_dim);
        }
    }

    void run(std::byte* workspace) {
        pass(false);
        if (!finite()) {
            // NaN or Inf in v (or in a score): again, leaving out the values that a row may not attend.
            start_item<E>(call_, item_, item_.rows, workspace, x_, at_);
            pass(true);
        }
        end_item<E, S>(call_, item_, x_);
    }

private:
    void pass(bool careful) {
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            if (call_.executor.stop_requested()) return;
            const std::int64_t n = keys_.end - j < block ? keys_.end - j : block;
            if (masked(j, n)) continue;
            score_block(j, n);
            const int vectors = static_cast<int>((n + w - 1) / w);
            for (std::int64_t r = 0; r < item_.rows; ++r) {
                Acc* s = at_.scores + r * block;
                transform_row(x_, x_.info[r], x_.row_max[r], s, j, vectors);
                finish_row(x_, r, s, at_.p + r * block, 0, 0, j, vectors);
            }
            if (careful) {
                add_values_carefully(j, n);
            } else {
                add_values(j, n);
            }
        }
    }

    bool masked(std::int64_t j, std::int64_t n) const {
        if (p_.mask.data == nullptr) return false;
        for (std::int64_t r = 0; r < item_.rows; ++r) {
            if (mask_any(p_.mask, item_.batch, x_.info[r], j, n)) return false;
        }
        return true;
    }

    bool finite() const {
        V check = V::zero();
        for (std::int64_t r = 0; r < item_.rows; ++r) {
            check = V::fma(V::load(x_.row_sum + r * w), V::zero(), check);
            for (std::int64_t c = 0; c < x_.o_stride; c += w) {
                check = V::fma(V::load(x_.o + r * x_.o_stride + c), V::zero(), check);
            }
        }
        return V::reduce_add(check) == 0;
    }

    // f(first row, Count<rows>) over all rows, in tiles of 4, 2 and 1.
    template <class F>
    FASTATTN_INLINE void for_row_tiles(F&& f) {
        std::int64_t r = 0;
        if constexpr (most_rows == 4) {
            for (; r + 4 <= item_.rows; r += 4) f(r, Count<4>{});
        }
        for (; r + 2 <= item_.rows; r += 2) f(r, Count<2>{});
        if (r < item_.rows) f(r, Count<1>{});
    }

    // scores[r][0..n) = q_r . k_j
    void score_block(std::int64_t j, std::int64_t n) {
        for_row_tiles([&](std::int64_t r, auto rows) {
            constexpr int heads = decltype(rows)::value, keys = w / heads;
            for (std::int64_t c = 0; c < n; c += keys) {
                const S* k[keys];
#pragma GCC unroll 16
                for (int i = 0; i < keys; ++i) {
                    const std::int64_t key = c + i < n ? c + i : n - 1;
                    k[i] = k_ + (j + key) * p_.k.seq;
                    if (r == 0) prefetch_row(v_ + (j + key) * p_.v.seq, p_.value_dim * static_cast<std::int64_t>(sizeof(S)));
                }
                alignas(64) Acc sums[w];
                dot_tile<heads, keys>(at_.q + r * call_.plan.q_stride, k).store(sums);
                for (int h = 0; h < heads; ++h) {
                    for (int i = 0; i < keys; ++i) at_.scores[(r + h) * block + c + i] = sums[h * keys + i];
                }
            }
        });
    }

    // Sums of `heads` rows of q with `keys` rows of k, heads-major; heads * keys = width.
    template <int heads, int keys>
    FASTATTN_INLINE V dot_tile(const Acc* q, const S* const (&k)[keys]) const {
        V acc[w];
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) acc[i] = V::zero();
        auto step = [&](std::int64_t d, auto load_key) {
            V qs[heads];
#pragma GCC unroll 4
            for (int h = 0; h < heads; ++h) qs[h] = V::load(q + h * call_.plan.q_stride + d);
#pragma GCC unroll 16
            for (int i = 0; i < keys; ++i) {
                const V x = load_key(k[i] + d);
#pragma GCC unroll 4
                for (int h = 0; h < heads; ++h) acc[h * keys + i] = V::fma(qs[h], x, acc[h * keys + i]);
            }
        };
        std::int64_t d = 0;
        for (; d + w <= p_.head_dim; d += w) step(d, [](const S* x) { return V::load(x); });
        if (d < p_.head_dim) step(d, [&](const S* x) { return load_n<V>(x, p_.head_dim - d); });
        return reduce_each(acc);
    }

    // O[r] += sum_j p[r][j] v_j
    void add_values(std::int64_t j, std::int64_t n) {
        const S* v = v_ + j * p_.v.seq;
        const S* next_k = k_ + (j + block) * p_.k.seq;
        const std::int64_t next = keys_.end - (j + block);  // keys there to prefetch, if positive
        const std::int64_t k_bytes = p_.head_dim * static_cast<std::int64_t>(sizeof(S));
        auto fetch = [&](std::int64_t k) {
            if (k < next) prefetch_row(next_k + k * p_.k.seq, k_bytes);
        };
        const std::int64_t whole = p_.value_dim / w * w;
        for_row_tiles([&](std::int64_t r, auto rows) {
            constexpr int m = decltype(rows)::value;
            for (std::int64_t c = 0; c < whole; c += E::nr) {
                const std::int64_t left = whole - c;
                const int vectors = left >= E::nr ? E::nv : static_cast<int>(left / w);
                Acc* o = x_.o + r * x_.o_stride + c;
                const Acc* p = at_.p + r * block;
                with_count<E::nv>(vectors, [&](auto count) {
                    constexpr int nv = decltype(count)::value;
                    if (r == 0 && c == 0) {
                        gemm_accumulate<E, m, nv>(o, x_.o_stride, p, block, v + c, p_.v.seq, n, fetch);
                    } else {
                        gemm_accumulate<E, m, nv>(o, x_.o_stride, p, block, v + c, p_.v.seq, n);
                    }
                });
            }
            if (whole < p_.value_dim) {
                if (r == 0) pack_tail(v + whole, n, p_.value_dim - whole);
                gemm_accumulate<E, m, 1>(x_.o + r * x_.o_stride + whole, x_.o_stride, at_.p + r * block, block, at_.v, w, n);
            }
        });
    }

    // The columns of v beyond whole vectors, zero-filled: (n, width).
    void pack_tail(const S* v, std::int64_t n, std::int64_t columns) {
        for (std::int64_t k = 0; k < n; ++k) load_n<V>(v + k * p_.v.seq, columns).store(at_.v + k * w);
    }

    void add_values_carefully(std::int64_t j, std::int64_t n) {
        for (std::int64_t k = 0; k < n; ++k) {
            const S* v = v_ + (j + k) * p_.v.seq;
            for (std::int64_t r = 0; r < item_.rows; ++r) {
                const Acc weight = at_.p[r * block + k];
                if (weight == 0 && !attends(x_, x_.info[r], j + k)) continue;
                Acc* o = x_.o + r * x_.o_stride;
                for (std::int64_t c = 0; c < p_.value_dim; c += w) {
                    const V x = load_n<V>(v + c, p_.value_dim - c);
                    V::fma(V::set1(weight), x, V::load(o + c)).store(o + c);
                }
            }
        }
    }

    const FlashCall& call_;
    const AttentionProblem& p_;
    ItemRange item_;
    FlashBlock<E> x_;
    ItemBuffers<E> at_{};
    KeyRange keys_{};
    const S* k_ = nullptr;
    const S* v_ = nullptr;
};

template <class E, class S>
void decode_item(const FlashCall& call, std::int64_t item, std::byte* workspace) {
    Decode<E, S>(call, item, workspace).run(workspace);
}

}  // namespace
}  // namespace fastattn::cpu
