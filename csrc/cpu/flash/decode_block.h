// Decode, what scores and values share: the keys of a block where they lie, tiles of rows, prefetching.
#pragma once

#include "cpu/flash/gemm.h"
#include "cpu/flash/item.h"

namespace fastattn::cpu {
namespace {

// With one row for each head: most bytes to prefetch ahead.
inline constexpr std::int64_t kAheadBytes = 64 * 1024;

// Rows of a register tile: 1, 2 or 4.
template <class V>
inline constexpr int kDecodeTileRows = V::width < 4 ? V::width : 4;

// How much further on in the order of reading, in numbers: kAheadBytes, but not beyond half a block, as the
// other tensor's comes between.
inline std::int64_t decode_ahead(std::int64_t seq, std::int64_t row_bytes, std::int64_t heads) {
    const std::int64_t key_bytes = heads * row_bytes, half = kDecodeBlock / 2;
    return (kAheadBytes < half * key_bytes ? (kAheadBytes + key_bytes - 1) / key_bytes : half) * seq;
}

// The keys of a row's list, numbered from 0 on.
class Selection {
public:
    Selection() = default;
    explicit Selection(const RowInfo& row) : begin_(row.begin), end_(row.end), list_(row.spans) {
        for (std::int64_t s = 0; s < intervals(); ++s) count_ += interval(s).end - interval(s).begin;
    }
    std::int64_t count() const { return count_; }

    // f(i, key) for i in [0, n): the keys from number t on.
    template <class F>
    FASTATTN_INLINE void for_keys(std::int64_t t, std::int64_t n, F f) {
        if (t < before_) at_ = before_ = 0;
        for (std::int64_t i = 0; i < n;) {
            const Span span = interval(at_);
            const std::int64_t size = span.end - span.begin, skip = t + i - before_;
            if (skip >= size) {
                before_ += size;
                ++at_;
                continue;
            }
            for (std::int64_t key = span.begin + skip; key < span.end && i < n; ++key, ++i) f(i, key);
        }
    }

private:
    std::int64_t intervals() const { return list_.first == nullptr ? (end_ > begin_ ? 1 : 0) : list_.count; }
    Span interval(std::int64_t s) const {
        if (list_.first == nullptr) return {begin_, end_};
        const std::int64_t from = list_.first[s].begin + list_.shift, to = list_.first[s].end + list_.shift;
        return {from > begin_ ? from : begin_, to < end_ ? to : end_};
    }

    std::int64_t begin_ = 0, end_ = 0, count_ = 0;
    std::int64_t at_ = 0, before_ = 0;  // an interval, and the keys before it
    RowSpans list_;
};

// The keys (or values) of an item, block by block. Where a row's numbers lie apart, or the keys, a block is
// copied first.
template <class T>
struct DecodeKeys {
    const T* first = nullptr;  // of the present block
    std::int64_t seq = 0, head = 0;  // strides

    DecodeKeys(const Operand& x, std::int64_t dim, const ItemRange& item, T* copy, const Selection& selection)
        : rows_(x, item.batch, item.kv_head), dim_(dim), copy_(copy), selection_(selection) {
        const KeyRun<T> run = rows_.run(0, 0);  // its strides alone
        selects_ = item.entry->plan.selects;
        copies_ = selects_ || run.number != 1 || !decodes_in_pages(x);
        seq = copies_ ? dim : run.key;
        head = copies_ ? kDecodeBlock * dim : run.head;
    }

    void go_to(std::int64_t j, std::int64_t n, std::int64_t heads) {
        if (selects_) return gather(j, n);
        first = rows_[j];
        if (!copies_) return;
        const T* row[kDecodeBlock];
        for (std::int64_t i = 0; i < n; ++i) row[i] = rows_[j + i];
        copy(row, n, heads);
    }

private:
    // n keys from number t of the list on.
    void gather(std::int64_t t, std::int64_t n) {
        const T* row[kDecodeBlock];
        selection_.for_keys(t, n, [&](std::int64_t i, std::int64_t key) {
            row[i] = rows_[key];
            const char* const at = reinterpret_cast<const char*>(row[i]);
            if (rows_.number_stride() != 1) return;
            for (std::int64_t b = 0; b < dim_ * static_cast<std::int64_t>(sizeof(T)); b += kLineBytes)
                fetch_line(at + b);
        });
        copy(row, n, 1);
    }

    // n rows of the first head, and of those after it, where a block is read.
    void copy(const T* const (&row)[kDecodeBlock], std::int64_t n, std::int64_t heads) {
        const std::int64_t number = rows_.number_stride();
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t h = 0; h < heads; ++h) {
                const T* const from = row[i] + h * rows_.head_stride();
                T* const to = copy_ + h * head + i * seq;
                if (number == 1) {
                    std::memcpy(to, from, static_cast<std::size_t>(dim_) * sizeof(T));
                } else {
                    for (std::int64_t d = 0; d < dim_; ++d) to[d] = from[d * number];
                }
            }
        }
        first = copy_;
    }

    KeyRows<T> rows_;
    std::int64_t dim_;
    T* copy_;
    Selection selection_;
    bool copies_ = false, selects_ = false;
};

// f(row, Count<rows>) over the rows of a head, in tiles of 4, 2 and 1.
template <class V, class Tile>
FASTATTN_INLINE void for_row_tiles(std::int64_t first, std::int64_t rows, Tile&& f) {
    std::int64_t r = first;
    const std::int64_t end = first + rows;
    if constexpr (kDecodeTileRows<V> == 4) {
        for (; r + 4 <= end; r += 4) f(r, Count<4>{});
    }
    for (; r + 2 <= end; r += 2) f(r, Count<2>{});
    if (r < end) f(r, Count<1>{});
}

}  // namespace
}  // namespace fastattn::cpu
