// Decode: few query rows (R = Sq * G, see most_decode_rows) per head, so that reading k and v is what takes the
// time. They are used where they lie, once for all rows, and in the order of the addresses: a few keys of all
// the heads of the item, then the next ones. While the keys of a block of kDecodeBlock are computed its values
// are on their way from memory, and then the keys of the next block. With one row for each head see score_rows.
//
//   q (heads*R, D)   k, v rows in memory, any storage type   scores, p (heads*R, kDecodeBlock)   O (heads*R, Dv)
#pragma once

#include "cpu/flash/gemm.h"
#include "cpu/flash/item.h"
#include "cpu/flash/pack.h"

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

// The keys (or values) of an item, block by block. Where a row's numbers lie apart, a block is copied first.
template <class T>
struct DecodeKeys {
    const T* first = nullptr;  // of the present block
    std::int64_t seq = 0, head = 0;  // strides

    DecodeKeys(const Operand& x, std::int64_t dim, const ItemRange& item, T* copy)
        : rows_(x, item.batch, item.kv_head), dim_(dim), copy_(copy) {
        const KeyRun<T> run = rows_.run(0, 0);
        copies_ = run.number != 1;
        seq = copies_ ? dim : run.key;
        head = copies_ ? kDecodeBlock * dim : run.head;
    }

    void go_to(std::int64_t j, std::int64_t n, std::int64_t heads) {
        const KeyRun<T> run = rows_.run(j, n);
        first = run.first;
        if (!copies_) return;
        for (std::int64_t h = 0; h < heads; ++h) {
            for (std::int64_t d = 0; d < dim_; ++d) {
                for (std::int64_t i = 0; i < n; ++i)
                    copy_[h * head + i * seq + d] = first[h * run.head + i * run.key + d * run.number];
            }
        }
        first = copy_;
    }

private:
    KeyRows<T> rows_;
    std::int64_t dim_;
    T* copy_;
    bool copies_ = false;
};

// E: engine of q . k and of the weights' sums; of the values, too, where it takes pairs of keys and there is more than
// one row to use them. Else these are multiplied by F, by fused multiply-add.
// S: dtype of q and out, K of k, W of v.
template <class E, class F, class S, class K, class W>
class Decode {
    using V = typename E::V;
    using Acc = typename E::Acc;
    static constexpr int w = V::width;
    static constexpr std::int64_t block = kDecodeBlock;
    static constexpr int most_rows = w < 4 ? w : 4;  // rows of a register tile: 1, 2 or 4
    static_assert(E::nv == F::nv && block % E::nr == 0);
    static constexpr std::int64_t kScoreKeys = 16;  // of a head at a time
    static constexpr std::int64_t kValueKeys = 32;  // O is loaded and stored once for so many
    // With one row for each head: keys side by side, keys for one load and store of O, most bytes to ask ahead.
    static constexpr int kSideBySide = w < 4 ? w : 4;
    static constexpr std::int64_t kRowValueKeys = 8;
    static constexpr std::int64_t kAheadBytes = 64 * 1024;

public:
    Decode(const FlashCall& call, const ItemRange& item, std::byte* workspace)
        : call_(call),
          p_(call.problem),
          item_(item),
          plan_(item_.entry->plan),
          x_(make_block<E>(p_, item_.batch, item_.entry->lengths)),
          k_(p_.k, p_.head_dim, item_, reinterpret_cast<K*>(gathered(workspace))),
          v_(p_.v, p_.value_dim, item_,
             reinterpret_cast<W*>(gathered(workspace) + gathered_key_bytes(p_, plan_))) {
        rows_ = item_.rows * item_.heads;
        one_row_ = item_.rows == 1;
        k_ahead_ = ahead(k_.seq, p_.head_dim * static_cast<std::int64_t>(sizeof(K)));
        v_ahead_ = ahead(v_.seq, p_.value_dim * static_cast<std::int64_t>(sizeof(W)));
        // Not by what an item happens to hold: bits must not depend on the other heads.
        pairs_ = E::scalars == 2 && item_.rows > 1 && p_.value_dim % (2 * w) == 0;
        keys_ = start_item<E>(call, item_, rows_, workspace, x_, at_);
        clear_output(x_, 0, rows_);
        for (std::int64_t r = 0; r < rows_; ++r) {
            const RowInfo& row = x_.info[r];
            pack_row<E>(at_.q + r * plan_.q_stride,
                        row_pointer<const S>(p_.q, item_.batch, row.query, row.head), p_.q.dim, p_.head_dim);
        }
    }

    void run(std::byte* workspace) {
        pass(false);
        take_all_totals();
        if (!finite()) {
            // NaN or Inf in v (or in a score): again, leaving out the values that a row may not attend.
            start_item<E>(call_, item_, rows_, workspace, x_, at_);
            clear_output(x_, 0, rows_);
            pass(true);
            take_all_totals();
        }
        if (pairs_) restore_columns();
        end_item<E, S>(call_, item_, x_);
    }

private:
    std::byte* gathered(std::byte* workspace) const {
        return workspace + flash_offsets(p_, plan_, tile_shape<E>()).gathered;
    }

    void pass(bool careful) {
        for (std::int64_t j = keys_.begin / block * block; j < keys_.end; j += block) {
            if (call_.executor.stop_requested()) return;
            const std::int64_t n = block_keys(j);
            if (!mask_hides(p_.mask, item_.batch, x_.info, rows_, j, n)) attend_block(j, n, careful);
            if (plan_.section_keys > 0 && (j + block) % plan_.section_keys == 0) end_sections();
        }
    }

    void attend_block(std::int64_t j, std::int64_t n, bool careful) {
        const int vectors = static_cast<int>((n + w - 1) / w);
        k_.go_to(j, n, item_.heads);
        if (!one_row_)
            next_ = keys_ahead(KeyRows<W>(p_.v, item_.batch, item_.kv_head), j, p_.value_dim, n, item_.heads);
        if (p_.head_dim % (w * E::scalars) == 0) {
            score<false>(n);
        } else {
            score<true>(n);
        }
        for (std::int64_t r = 0; r < rows_; ++r) {
            Acc* s = at_.scores + r * block;
            const V top = transform_row<E, 1>(x_, x_.info[r], s, j, vectors);
            follow_peak(x_, r, V::reduce_max(top), at_.p + r * block, 0, 0);
            store_weights(r, s, j, vectors);
        }
        if (!one_row_) next_ = keys_after(j);
        v_.go_to(j, n, item_.heads);
        if (careful) {
            for (std::int64_t h = 0; h < item_.heads; ++h)
                add_values_carefully(h * item_.rows, v_.first + h * v_.head, j, n);
        } else {
            add_values(v_.first, n);
        }
    }

    void end_sections() {
        for (std::int64_t r = 0; r < rows_; ++r) end_section(x_, r);
        clear_output(x_, 0, rows_);
    }

    void take_all_totals() {
        if (plan_.section_keys == 0) return;
        for (std::int64_t r = 0; r < rows_; ++r) {
            end_section(x_, r);
            take_totals(x_, r);
        }
    }

    std::int64_t block_keys(std::int64_t j) const { return keys_.end - j < block ? keys_.end - j : block; }

    // What is read after the present part of a block: the values of its keys, then the keys of the next block. Asked
    // for row by row, in the order of the addresses, while the present part is computed.
    using Ahead = RowPrefetch<false>;

    Ahead keys_after(std::int64_t j) const {
        j += block;
        const ItemRange* item = &item_;
        std::int64_t n = block_keys(j);
        ItemRange next_item;
        if (j >= keys_.end) {
            const std::int64_t next = call_.executor.next_item();
            if (next >= call_.schedule.items) return {};
            next_item = item_range(call_, next);
            item = &next_item;
            if (!next_item.entry->plan.decode) return {};
            const KeyRange keys = entry_keys(p_, next_item.entry->lengths, 0);
            j = (keys.begin > next_item.key_begin ? keys.begin : next_item.key_begin) / block * block;
            n = next_item.key_end - j < block ? next_item.key_end - j : block;
        }
        return keys_ahead(KeyRows<K>(p_.k, item->batch, item->kv_head), j, p_.head_dim, n, item->heads);
    }

    // x (in s) of row r becomes weights, and its sums follow.
    void store_weights(std::int64_t r, Acc* s, std::int64_t j, int vectors) {
        const V shift = row_shift(x_, r);
        Acc* const sums = x_.row_sum + r * E::sums * w;
        Acc* const p = at_.p + r * block;
        for (int c = 0; c < vectors; c += E::nv) {
            V weights[E::nv];
#pragma GCC unroll 8
            for (int n = 0; n < E::nv; ++n) {
                const V x = V::load(s + (c + n) * w) - shift;
                weights[n] = c + n >= vectors ? V::zero() : pairs_ ? exp2<E::accuracy>(x) : exp2(x);
            }
            // Before dropout: the denominator knows nothing of it.
            if (pairs_) {
                E::add_weights(weights, sums);
            } else {
                F::add_weights(weights, sums);
                if constexpr (E::sums > 1) F::add_weights(weights, sums + w);
            }
            if (p_.dropout > 0) [[unlikely]] {
#pragma GCC unroll 8
                for (int n = 0; n < E::nv; ++n) weights[n].store(s + (c + n) * w);
            } else {
                store_vectors(weights, p, c);
            }
        }
        if (p_.dropout > 0) [[unlikely]] {
            drop_weights(x_, x_.info[r], s, j, vectors * w);
            for (int c = 0; c < vectors; c += E::nv) {
                V weights[E::nv];
                for (int n = 0; n < E::nv; ++n) weights[n] = V::load(s + (c + n) * w);
                store_vectors(weights, p, c);
            }
        }
    }

    // Vectors of a row of weights from vector c on, as the product with v takes them.
    FASTATTN_INLINE void store_vectors(const V (&weights)[E::nv], Acc* p, int c) const {
#pragma GCC unroll 8
        for (int n = 0; n < E::nv; n += 2) {
            if (pairs_) {
                E::store_weights(weights[n], weights[n + 1], p, (c + n) * w);
            } else {
                F::store_weights(weights[n], weights[n + 1], p, (c + n) * w);
            }
        }
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
    template <class Tile>
    FASTATTN_INLINE void for_row_tiles(std::int64_t first, Tile&& f) {
        std::int64_t r = first;
        const std::int64_t end = first + item_.rows;
        if constexpr (most_rows == 4) {
            for (; r + 4 <= end; r += 4) f(r, Count<4>{});
        }
        for (; r + 2 <= end; r += 2) f(r, Count<2>{});
        if (r < end) f(r, Count<1>{});
    }

    // scores[r][0..n) = q_r . k_j for all rows. has_tail: D is not a multiple of the width; code of its own, so
    // that the sums stay in registers without. The sums are the same to the last bit either way.
    template <bool has_tail>
    void score(std::int64_t n) {
        if (one_row_) {
            score_rows<has_tail>(k_.first, n);
        } else {
            score_block<has_tail>(k_.first, n);
        }
    }

    template <bool has_tail>
    void score_block(const K* block_begin, std::int64_t n) {
        for (std::int64_t begin = 0; begin < n; begin += kScoreKeys) {
            const std::int64_t end = n - begin < kScoreKeys ? n : begin + kScoreKeys;
            for (std::int64_t h = 0; h < item_.heads; ++h) {
                const K* keys_begin = block_begin + h * k_.head;
                const std::int64_t first = h * item_.rows;
                for_row_tiles(first, [&](std::int64_t r, auto rows) {
                    constexpr int heads = decltype(rows)::value, keys = w / heads;
                    for (std::int64_t c = begin; c < end; c += keys) {
                        if (r == first) next_.advance(keys);
                        const K* k[keys];
#pragma GCC unroll 16
                        for (int i = 0; i < keys; ++i)
                            k[i] = keys_begin + (c + i < n ? c + i : n - 1) * k_.seq;
                        alignas(64) Acc sums[w];
                        dot_tile<heads, keys, has_tail>(at_.q + r * plan_.q_stride, k).store(sums);
                        for (int m = 0; m < heads; ++m)
                            std::memcpy(at_.scores + (r + m) * block + c, sums + m * keys,
                                        keys * sizeof(Acc));
                    }
                });
            }
        }
    }

    // With one row for each head the products cost next to nothing, and the time is that of reading. kSideBySide keys
    // are read at once, all heads of these, then the next ones, each line prefetches one further on: the pattern that
    // comes nearest to what plain reading reaches.

    // How much further on: kAheadBytes in the order of reading, but not beyond half a block, as the other
    // tensor's comes between.
    std::int64_t ahead(std::int64_t seq, std::int64_t row_bytes) const {
        const std::int64_t key_bytes = item_.heads * row_bytes;
        return (kAheadBytes < block / 2 * key_bytes ? (kAheadBytes + key_bytes - 1) / key_bytes : block / 2) *
               seq;
    }

    // scores[h][0..n) = q_h . k_jh for all heads, one row each
    template <bool has_tail>
    void score_rows(const K* block_begin, std::int64_t n) {
        constexpr int groups = w / kSideBySide;
        const std::int64_t q_stride = plan_.q_stride, tiled = item_.heads / groups * groups;
        const auto key = [&](std::int64_t c) { return block_begin + (c < n ? c : n - 1) * k_.seq; };
        for (std::int64_t c = 0; c < n; c += kSideBySide) {
            const K* k[kSideBySide];
            for (int i = 0; i < kSideBySide; ++i) k[i] = key(c + i);
            for (std::int64_t h = 0; h < tiled; h += groups) {
                alignas(64) Acc sums[w];
                dot_groups<has_tail>(at_.q + h * q_stride, q_stride, k, h * k_.head, k_.head).store(sums);
                for (int g = 0; g < groups; ++g)
                    std::memcpy(at_.scores + (h + g) * block + c, sums + g * kSideBySide,
                                kSideBySide * sizeof(Acc));
            }
        }
        // The heads that are left over: more keys of one head instead.
        for (std::int64_t h = tiled; h < item_.heads; ++h) {
            const Acc* q = at_.q + h * q_stride;
            Acc* scores = at_.scores + h * block;
            std::int64_t c = 0;
            for (; c + w <= n; c += w) {
                const K* k[kSideBySide];
                for (int i = 0; i < kSideBySide; ++i) k[i] = key(c + i);
                dot_groups<has_tail>(q, 0, k, h * k_.head, kSideBySide * k_.seq).store(scores + c);
            }
            if (c == n) continue;
            const K* k[w];
            for (int i = 0; i < w; ++i) k[i] = key(c + i) + h * k_.head;
            dot_tile<1, w, has_tail>(q, k).store(scores + c);
        }
    }

    // dot_tile with a row of q for each group, and with prefetching; the order over u is the same, as bits depend on it.
    // Sums of width rows of k, kSideBySide in a group: group g begins at k[i] + first + g * k_step, and is multiplied
    // with q + g * q_step.
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
            for (; (u + w) * E::scalars <= p_.head_dim; u += w) {
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
                    acc[g + i] = E::mma(x, E::load_units(k[i] + first, 1, u, p_.head_dim), acc[g + i]);
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
            for (int h = 0; h < heads; ++h) qs[h] = V::load(q + h * plan_.q_stride + u);
#pragma GCC unroll 16
            for (int i = 0; i < keys; ++i) {
                const V x = load_key(k[i], u);
#pragma GCC unroll 4
                for (int h = 0; h < heads; ++h) acc[h * keys + i] = E::mma(qs[h], x, acc[h * keys + i]);
            }
        };
        std::int64_t u = 0;
        for (; (u + w) * E::scalars <= p_.head_dim; u += w)
            step(u, [](const K* x, std::int64_t at) { return E::load_whole(x, at); });
        if constexpr (has_tail)
            step(u, [&](const K* x, std::int64_t at) { return E::load_units(x, 1, at, p_.head_dim); });
        return reduce_each(acc);
    }

    // A tile of the values' product prefetches some of the next rows, step by step: too many at once would wait.
    struct FetchAhead {
        static constexpr int steps = 4;
        static constexpr bool vectors = false;
        Ahead& next;
        const std::int64_t rows;
        FASTATTN_INLINE void operator()(int) const { next.advance(rows); }
    };

    std::int64_t whole_columns() const { return p_.value_dim / w * w; }
    // Their products are one sum, that is then added to O.
    std::int64_t keys_at_once() const { return one_row_ ? kRowValueKeys : kValueKeys; }

    // O[r] += sum_j p[r][j] v_j for all rows, a few keys of all heads at a time. With pairs_ O has its columns as the
    // engine pairs them, until restore_columns().
    void add_values(const W* v, std::int64_t n) {
        const std::int64_t whole = whole_columns();
        const std::int64_t row_tiles = item_.rows / most_rows + item_.rows % most_rows / 2 + item_.rows % 2,
                           tiles = row_tiles * ((whole + F::nr - 1) / F::nr),
                           steps = tiles * FetchAhead::steps;
        FetchAhead ahead{next_, steps == 0 ? 0 : (kValueKeys + steps - 1) / steps};
        const std::int64_t at_once = keys_at_once();
        for (std::int64_t k = 0; k < n; k += at_once) {
            const std::int64_t depth = n - k < at_once ? n - k : at_once;
            for (std::int64_t h = 0; h < item_.heads; ++h) {
                const W* rows_begin = v + k * v_.seq + h * v_.head;
                for_row_tiles(h * item_.rows, [&](std::int64_t r, auto rows) {
                    constexpr int m = decltype(rows)::value;
                    for (std::int64_t c = 0; c < whole; c += F::nr) {
                        const int vectors = whole - c < F::nr ? static_cast<int>((whole - c) / w) : F::nv;
                        with_count<F::nv>(vectors, [&](auto count) {
                            add_tile<m, decltype(count)::value>(r, c, k, rows_begin + c, depth, ahead);
                        });
                    }
                });
            }
        }
        if (whole == p_.value_dim) return;
        for (std::int64_t h = 0; h < item_.heads; ++h) {
            pack_tail(v + h * v_.head + whole, n, p_.value_dim - whole);
            for_row_tiles(h * item_.rows, [&](std::int64_t r, auto rows) {
                gemm_accumulate<F, decltype(rows)::value, 1>(x_.o + r * x_.o_stride + whole, x_.o_stride,
                                                             at_.p + r * block, block, at_.v, w, n);
            });
        }
    }

    // O[r .. r+MR)[c .. c + NV*width) += p . v over `depth` keys from k on; v: the first of them, column c.
    template <int MR, int NV>
    FASTATTN_INLINE void add_tile(std::int64_t r, std::int64_t c, std::int64_t k, const W* v,
                                  std::int64_t depth, FetchAhead& ahead) {
        Acc* const o = x_.o + r * x_.o_stride + c;
        if constexpr (E::scalars == 2 && NV % 2 == 0) {
            if (pairs_) {
                const std::int64_t pairs = (depth + 1) / 2;
                gemm_accumulate_with<E, MR, NV>(o, x_.o_stride, at_.p + r * block + k / 2, block,
                                                PairedRows<W>{v, depth}, v_.seq, pairs, pairs, ahead, 1,
                                                false);
                return;
            }
        }
        const Acc* p = at_.p + r * block + k;
        if constexpr (MR == 1) {
            if (one_row_) {
                gemm_accumulate<F, 1, NV>(o, x_.o_stride, p, block, RowsAhead<W>{v, v_ahead_}, v_.seq,
                                          depth);
                return;
            }
        }
        gemm_accumulate_with<F, MR, NV>(o, x_.o_stride, p, block, v, v_.seq, depth, depth, ahead, 1, false);
    }

    void restore_columns() {
        if constexpr (E::scalars == 2) {
            for (std::int64_t r = 0; r < rows_; ++r) {
                Acc* const o = x_.o + r * x_.o_stride;
                for (std::int64_t c = 0; c < p_.value_dim; c += 2 * w) {
                    V first = V::load(o + c), second = V::load(o + c + w);
                    E::restore_columns(first, second);
                    first.store(o + c);
                    second.store(o + c + w);
                }
            }
        }
    }

    // The columns of v beyond whole vectors, zero-filled: (n, width).
    void pack_tail(const W* v, std::int64_t n, std::int64_t columns) {
        for (std::int64_t k = 0; k < n; ++k) load_n<V>(v + k * v_.seq, columns).store(at_.v + k * w);
    }

    void add_values_carefully(std::int64_t first, const W* values, std::int64_t j, std::int64_t n) {
        if constexpr (E::scalars == 2) {
            if (pairs_) return add_pairs_carefully(first, values, j, n);
        }
        // The sums of add_values to the last bit, less the values that a row may not attend.
        const std::int64_t whole = whole_columns();
        for (std::int64_t c = 0; c < p_.value_dim; c += w) {
            const std::int64_t at_once = c < whole ? keys_at_once() : n;
            for (std::int64_t begin = 0; begin < n; begin += at_once) {
                const std::int64_t end = n - begin < at_once ? n : begin + at_once;
                for (std::int64_t r = first; r < first + item_.rows; ++r) {
                    V sum = V::zero();
                    for (std::int64_t k = begin; k < end; ++k) {
                        const Acc weight = at_.p[r * block + k];
                        if (weight == 0 && !attends(x_, x_.info[r], j + k)) continue;
                        const V x = load_n<V>(values + k * v_.seq + c, p_.value_dim - c);
                        sum = V::fma(V::set1(weight), x, sum);
                    }
                    Acc* const o = x_.o + r * x_.o_stride + c;
                    (V::load(o) + sum).store(o);
                }
            }
        }
    }

    // The sums of add_values to the last bit, with zeros for NaN and Inf; then these, for the rows that attend them.
    void add_pairs_carefully(std::int64_t first, const W* values, std::int64_t j, std::int64_t n) {
        constexpr std::int64_t columns = 2 * w;
        W* const strip = reinterpret_cast<W*>(at_.v);
        for (std::int64_t c = 0; c < p_.value_dim; c += columns) {
            for (std::int64_t i = 0; i < n * columns; ++i) {
                const W x = values[i / columns * v_.seq + c + i % columns];
                strip[i] = is_finite(x) ? x : W{};
            }
            for_row_tiles(first, [&](std::int64_t r, auto rows) {
                for (std::int64_t k = 0; k < n; k += kValueKeys) {
                    const std::int64_t depth = n - k < kValueKeys ? n - k : kValueKeys;
                    gemm_accumulate<E, decltype(rows)::value, 2>(
                        x_.o + r * x_.o_stride + c, x_.o_stride, at_.p + r * block + k / 2, block,
                        PairedRows<W>{strip + k * columns, depth}, columns, (depth + 1) / 2);
                }
            });
            for (std::int64_t i = 0; i < n * columns; ++i) {
                const std::int64_t k = i / columns;
                const W x = values[k * v_.seq + c + i % columns];
                if (is_finite(x)) continue;
                for (std::int64_t r = first; r < first + item_.rows; ++r) {
                    if (!attends(x_, x_.info[r], j + k)) continue;
                    x_.o[r * x_.o_stride + c + E::paired_column(i % columns)] +=
                        E::weight(at_.p + r * block, k) * to_scalar(x);
                }
            }
        }
    }

    static bool is_finite(W x) { return to_scalar(x) - to_scalar(x) == 0; }

    const FlashCall& call_;
    const AttentionProblem& p_;
    ItemRange item_;
    const FlashPlan& plan_;
    FlashBlock<E> x_;
    DecodeKeys<K> k_;
    DecodeKeys<W> v_;
    ItemBuffers<E> at_{};
    KeyRange keys_{};
    std::int64_t rows_ = 0;  // of all heads
    Ahead next_;
    bool one_row_ = false;  // of each head
    std::int64_t k_ahead_ = 0, v_ahead_ = 0;
    bool pairs_ = false;  // keys two at a time in the product with v
};

template <class E, class F, class S, class K, class W>
void decode_item(const FlashCall& call, const ItemRange& item, std::byte* workspace) {
    Decode<E, F, S, K, W>(call, item, workspace).run(workspace);
}

}  // namespace
}  // namespace fastattn::cpu
