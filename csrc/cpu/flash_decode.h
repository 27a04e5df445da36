// Decode: few query rows (R = Sq * G <= kDecodeRows) per head, so that reading k and v is what takes the
// time. They are used where they lie, once for all rows. A block of kDecodeBlock keys of all the heads of
// the item is first touched in the order of the addresses, which is what the hardware's prefetchers follow;
// the products then find it in the cache, in whatever order they like. With one row for each of several heads
// the products are as cheap as the touching and take its place.
//
//   q (heads*R, D)   k, v rows in memory, any storage type   scores, p (heads*R, kDecodeBlock)   O (heads*R, Dv)
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
        for (int i = 0; i < n; ++i)
            r[i] = V::interleave_lo(r[i], r[i + n]) + V::interleave_hi(r[i], r[i + n]);
    }
    return r[0];
}

// Reads one byte of every cache line.
inline void touch(const void* begin, std::int64_t bytes) {
    const volatile char* p = static_cast<const volatile char*>(begin);
    for (std::int64_t b = 0; b < bytes; b += 64) static_cast<void>(p[b]);
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
        rows_ = item_.rows * item_.heads;
        one_row_ = item_.rows == 1 && item_.heads > 1 && item_.heads <= kDecodeBlock;
        keys_ = start_item<E>(call, item_, rows_, workspace, x_, at_);
        k_ = row_pointer<const S>(p_.k, item_.batch, 0, item_.kv_head);
        v_ = row_pointer<const S>(p_.v, item_.batch, 0, item_.kv_head);
        for (std::int64_t r = 0; r < rows_; ++r) {
            const RowInfo& row = x_.info[r];
            pack_row<E>(at_.q + r * call_.plan.q_stride,
                        row_pointer<const S>(p_.q, item_.batch, row.query, row.head), p_.q.dim, p_.head_dim);
        }
    }

    void run(std::byte* workspace) {
        pass(false);
        if (!finite()) {
            // NaN or Inf in v (or in a score): again, leaving out the values that a row may not attend.
            start_item<E>(call_, item_, rows_, workspace, x_, at_);
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
            const int vectors = static_cast<int>((n + w - 1) / w);
            if (one_row_) {
                score_keys(j, n);
            } else {
                touch_block(k_, p_.k, p_.head_dim, j, n);
            }
            for (std::int64_t h = 0; h < item_.heads; ++h) {
                const std::int64_t first = h * item_.rows;
                if (!one_row_) score_block(first, k_ + h * p_.k.head + j * p_.k.seq, n);
                for (std::int64_t r = first; r < first + item_.rows; ++r) {
                    Acc* s = at_.scores + r * block;
                    const V top = transform_row<E, 1>(x_, x_.info[r], s, j, vectors);
                    follow_peak(x_, r, V::reduce_max(top), at_.p + r * block, 0, 0);
                    store_weights(r, s, at_.p + r * block, j, vectors);
                }
            }
            if (one_row_ && !careful) {
                add_rows(j, n);
                continue;
            }
            touch_block(v_, p_.v, p_.value_dim, j, n);
            for (std::int64_t h = 0; h < item_.heads; ++h) {
                const S* v = v_ + h * p_.v.head + j * p_.v.seq;
                if (careful) {
                    add_values_carefully(h * item_.rows, v, j, n);
                } else {
                    add_values(h * item_.rows, v, n);
                }
            }
        }
    }

    // x (in s) of row r becomes weights, and its sum follows.
    void store_weights(std::int64_t r, const Acc* s, Acc* p, std::int64_t j, int vectors) {
        const V shift = row_shift(x_, r);
        Acc* const memory = x_.row_sum + r * w;
        V sum = V::load(memory);
        for (int c = 0; c < vectors; ++c) {
            const V weight = exp2(V::load(s + c * w) - shift);
            sum = sum + weight;
            weight.store(p + c * w);
        }
        sum.store(memory);
        // After the sum: the denominator knows nothing of it.
        if (p_.dropout > 0) drop_weights(x_, x_.info[r], p, j, vectors * w);
    }

    void touch_block(const S* x, const Operand& layout, std::int64_t dim, std::int64_t j,
                     std::int64_t n) const {
        const auto size = static_cast<std::int64_t>(sizeof(S));
        const bool dense = layout.head == dim;
        for (std::int64_t k = j; k < j + n; ++k) {
            const S* row = x + k * layout.seq;
            if (dense) {
                touch(row, item_.heads * dim * size);
            } else {
                for (std::int64_t h = 0; h < item_.heads; ++h) touch(row + h * layout.head, dim * size);
            }
        }
    }

    bool masked(std::int64_t j, std::int64_t n) const {
        if (p_.mask.data == nullptr) return false;
        for (std::int64_t r = 0; r < rows_; ++r) {
            if (mask_any(p_.mask, item_.batch, x_.info[r], j, n)) return false;
        }
        return true;
    }

    bool finite() const {
        V check = V::zero();
        for (std::int64_t r = 0; r < rows_; ++r) {
            check = V::fma(V::load(x_.row_sum + r * E::sums * w), V::zero(), check);
            for (std::int64_t c = 0; c < x_.o_stride; c += w) {
                check = V::fma(V::load(x_.o + r * x_.o_stride + c), V::zero(), check);
            }
        }
        return V::reduce_add(check) == 0;
    }

    // f(row, Count<rows>) over the rows of a head, in tiles of 4, 2 and 1.
    template <class F>
    FASTATTN_INLINE void for_row_tiles(std::int64_t first, F&& f) {
        std::int64_t r = first;
        const std::int64_t end = first + item_.rows;
        if constexpr (most_rows == 4) {
            for (; r + 4 <= end; r += 4) f(r, Count<4>{});
        }
        for (; r + 2 <= end; r += 2) f(r, Count<2>{});
        if (r < end) f(r, Count<1>{});
    }

    // scores[r][0..n) = q_r . k_j for the rows of a head
    void score_block(std::int64_t first, const S* keys_begin, std::int64_t n) {
        if (p_.head_dim % w == 0) {
            score_block<false>(first, keys_begin, n);
        } else {
            score_block<true>(first, keys_begin, n);
        }
    }
    // has_tail: D is not a multiple of the width. Code of its own, so that the sums stay in registers without.
    template <bool has_tail>
    void score_block(std::int64_t first, const S* keys_begin, std::int64_t n) {
        for_row_tiles(first, [&](std::int64_t r, auto rows) {
            constexpr int heads = decltype(rows)::value, keys = w / heads;
            for (std::int64_t c = 0; c < n; c += keys) {
                const S* k[keys];
#pragma GCC unroll 16
                for (int i = 0; i < keys; ++i) k[i] = keys_begin + (c + i < n ? c + i : n - 1) * p_.k.seq;
                alignas(64) Acc sums[w];
                dot_tile<heads, keys, has_tail>(at_.q + r * call_.plan.q_stride, k).store(sums);
                for (int h = 0; h < heads; ++h) {
                    for (int i = 0; i < keys; ++i) at_.scores[(r + h) * block + c + i] = sums[h * keys + i];
                }
            }
        });
    }

    // With one row for each head the products cost no more than touching does: k and v are used as they are read,
    // all heads of a key, then the next key. The sums are those of score_block and add_values to the last bit.

    // scores[h][0..n) = q_h . k_jh for all heads, by squares of width keys and width heads
    void score_keys(std::int64_t j, std::int64_t n) {
        for (std::int64_t c = 0; c < n; c += w) {
            const int keys = n - c < w ? static_cast<int>(n - c) : w;
            for (int i = 0; i < keys; ++i) {
                const S* key = k_ + (j + c + i) * p_.k.seq;
                for (std::int64_t h = 0; h < item_.heads; h += w) {
                    const int heads = item_.heads - h < w ? static_cast<int>(item_.heads - h) : w;
                    V sums[w];
                    for (int m = 0; m < w; ++m) sums[m] = V::zero();
                    for (int m = 0; m < heads; ++m)
                        sums[m] = dot(at_.q + (h + m) * call_.plan.q_stride, key + (h + m) * p_.k.head);
                    reduce_each(sums).store(at_.v + (h * w) + i * w);  // (heads / width, keys, width)
                }
            }
            for (std::int64_t h = 0; h < item_.heads; h += w) {
                V square[w];
                for (int i = 0; i < w; ++i) square[i] = i < keys ? V::load(at_.v + h * w + i * w) : V::zero();
                transpose(square);
                for (int m = 0; m < w && h + m < item_.heads; ++m)
                    square[m].store(at_.scores + (h + m) * block + c);
            }
        }
    }

    FASTATTN_INLINE V dot(const Acc* q, const S* k) const {
        V sum = V::zero();
        std::int64_t d = 0;
        for (; d + w <= p_.head_dim; d += w) sum = V::fma(V::load(q + d), V::load(k + d), sum);
        if (d < p_.head_dim) sum = V::fma(V::load(q + d), load_n<V>(k + d, p_.head_dim - d), sum);
        return sum;
    }

    // O[h] += sum_j p[h][j] v_jh for all heads, two keys at a time
    void add_rows(std::int64_t j, std::int64_t n) {
        const std::int64_t whole = p_.value_dim / w * w;
        for (std::int64_t k = 0; k < n; k += 2) {
            const bool two = k + 1 < n;
            for (std::int64_t h = 0; h < item_.heads; ++h) {
                const S* v = v_ + (j + k) * p_.v.seq + h * p_.v.head;
                const S* next = v + (two ? p_.v.seq : 0);
                const Acc* p = at_.p + h * block + k;
                const V a = V::set1(p[0]), b = V::set1(two ? p[1] : Acc(0));
                Acc* o = x_.o + h * x_.o_stride;
                const auto add = [&](std::int64_t c, auto load) {
                    V sum = V::fma(a, load(v + c), V::load(o + c));
                    if (two) sum = V::fma(b, load(next + c), sum);
                    sum.store(o + c);
                };
                for (std::int64_t c = 0; c < whole; c += w) add(c, [](const S* x) { return V::load(x); });
                if (whole < p_.value_dim)
                    add(whole, [&](const S* x) { return load_n<V>(x, p_.value_dim - whole); });
            }
        }
    }

    // Sums of `heads` rows of q with `keys` rows of k, heads-major; heads * keys = width.
    template <int heads, int keys, bool has_tail>
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
        if constexpr (has_tail) step(d, [&](const S* x) { return load_n<V>(x, p_.head_dim - d); });
        return reduce_each(acc);
    }

    // O[r] += sum_j p[r][j] v_j for the rows of a head
    void add_values(std::int64_t first, const S* v, std::int64_t n) {
        const std::int64_t whole = p_.value_dim / w * w;
        for_row_tiles(first, [&](std::int64_t r, auto rows) {
            constexpr int m = decltype(rows)::value;
            for (std::int64_t c = 0; c < whole; c += E::nr) {
                const std::int64_t left = whole - c;
                const int vectors = left >= E::nr ? E::nv : static_cast<int>(left / w);
                with_count<E::nv>(vectors, [&](auto count) {
                    gemm_accumulate<E, m, decltype(count)::value>(x_.o + r * x_.o_stride + c, x_.o_stride,
                                                                  at_.p + r * block, block, v + c, p_.v.seq,
                                                                  n);
                });
            }
            if (whole < p_.value_dim) {
                if (r == first) pack_tail(v + whole, n, p_.value_dim - whole);
                gemm_accumulate<E, m, 1>(x_.o + r * x_.o_stride + whole, x_.o_stride, at_.p + r * block,
                                         block, at_.v, w, n);
            }
        });
    }

    // The columns of v beyond whole vectors, zero-filled: (n, width).
    void pack_tail(const S* v, std::int64_t n, std::int64_t columns) {
        for (std::int64_t k = 0; k < n; ++k) load_n<V>(v + k * p_.v.seq, columns).store(at_.v + k * w);
    }

    void add_values_carefully(std::int64_t first, const S* values, std::int64_t j, std::int64_t n) {
        for (std::int64_t k = 0; k < n; ++k) {
            const S* v = values + k * p_.v.seq;
            for (std::int64_t r = first; r < first + item_.rows; ++r) {
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
    std::int64_t rows_ = 0;  // of all heads
    bool one_row_ = false;  // of each of several heads
    const S* k_ = nullptr;
    const S* v_ = nullptr;
};

template <class E, class S>
void decode_item(const FlashCall& call, std::int64_t item, std::byte* workspace) {
    Decode<E, S>(call, item, workspace).run(workspace);
}

}  // namespace
}  // namespace fastattn::cpu
