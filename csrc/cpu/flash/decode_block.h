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
