// How a problem becomes chunks whose scores fit the second-level cache: pure functions of the problem and of
// the device's sizes, tested without a GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include <fastattn/attention.h>

#include "cuda/simt/chunk.h"

namespace fastattn::cuda {

using Index = std::int64_t;

constexpr Index round_up(Index n, Index to) noexcept { return (n + to - 1) / to * to; }

// Bytes of scores that may exist at once, so that they stay in a second-level cache of `l2_bytes`.
constexpr std::size_t score_limit(std::size_t l2_bytes) noexcept {
    constexpr std::size_t most = std::size_t{24} << 20, least = std::size_t{4} << 20;
    return std::min(most, std::max(l2_bytes / 5 * 2, std::min(least, l2_bytes)));
}

constexpr std::size_t score_size(DType dtype) noexcept { return dtype == DType::f64 ? 8 : 4; }
// Elements from one row of scores to the next.
constexpr Index score_stride(Index keys) noexcept { return round_up(std::max<Index>(keys, 1), 8); }

// All of a problem, with the keys that some row may attend.
Chunk whole(const AttentionProblem& p) noexcept;
// Whether some row may attend less than all keys of a chunk.
bool is_restricted(const AttentionProblem& p) noexcept;
std::size_t score_bytes(const AttentionProblem& p, const Chunk& chunk) noexcept;

// Walks `region` of the problem in chunks: each is a range of heads of one batch entry, or all heads of the
// region of several entries; together they cover every row of every head once. A chunk's scores stay within
// `limit` bytes, but one row of one kv head is never divided. Keys: those that some row of the chunk may
// attend, begun at a multiple of 8.
class Chunks {
public:
    Chunks(const AttentionProblem& p, const Chunk& region, std::size_t limit) noexcept;
    bool next(Chunk& chunk) noexcept;  // false: no more

private:
    Index restricted_rows() const noexcept;
    void set_tile() noexcept;

    const AttentionProblem& p_;
    const Chunk region_;
    const Index limit_;  // scores
    bool apart_;  // batch entries have key ranges of their own that are worth keeping apart
    Index row_ = 0, rows_ = 0;  // the tile of rows
    Index batch_ = 0, kv_head_ = 0;  // where the next chunk of the tile begins
    Index batches_ = 0, kv_heads_ = 0;  // of a chunk
};

// The union of key_range over the rows of a chunk, its begin rounded down to a multiple of 8.
KeyRange keys_of(const AttentionProblem& p, const Chunk& chunk) noexcept;

// How the query heads of a group become the rows of one product.
enum class Fold {
    none,  // one product for each query head; k and v are shared
    inner,  // row i * G + g: neighbours in memory are heads of a position
    outer,  // row g * rows + i: neighbours in memory are positions of a head
};
// An array with a row for each query and head, of `dims` elements.
struct QueryRows {
    const Operand& array;
    Index dims;
};
// One way for all of `arrays`, whose rows are those of the same scores.
Fold fold_of(Index group, const Chunk& chunk, std::initializer_list<QueryRows> arrays) noexcept;
inline Fold fold_of(const AttentionProblem& p, const Operand& q, const Operand& out,
                    const Chunk& chunk) noexcept {
    return fold_of(p.group, chunk, {{q, p.head_dim}, {out, p.value_dim}});
}

// Whether there is no row of any head.
inline bool is_empty(const AttentionProblem& p) noexcept {
    return p.batch == 0 || p.q_heads == 0 || p.kv_heads == 0 || p.q_size == 0;
}

// Whether cuBLAS can read (or write) an array of `rows` rows of `dims` elements where it lies: neighbours in
// the last axis, rows apart, and for 16-bit types 16-byte steps, without which it has no fast kernels.
bool is_gemm_operand(const Operand& x, DType dtype, Index rows, Index dims) noexcept;
// The same sizes as a compact array that is one: [batches][heads][rows][dims, rounded up to 16 bytes], whose
// element (batch, head, row) of the region is the first.
Operand compact_operand(void* data, DType dtype, const Chunk& region, Index first_head, Index heads,
                        Index first_row, Index rows, Index dims) noexcept;
// Elements from one of its rows to the next.
Index row_stride(DType dtype, Index dims) noexcept;
std::size_t compact_bytes(DType dtype, Index batches, Index heads, Index rows, Index dims) noexcept;

}  // namespace fastattn::cuda
