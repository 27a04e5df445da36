// The workspace of one thread: where each buffer of an item lies. One walk gives the offsets and the
// total, so that the size asked for and the pointers handed out cannot disagree.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/visible.h"
#include "cpu/flash/schedule.h"

namespace fastattn::cpu {
namespace {

// Whether all heads of a row of x lie side by side in memory, before the next row.
inline bool heads_side_by_side(const Operand& x) {
    const auto size = [](std::int64_t stride) { return stride < 0 ? -stride : stride; };
    return size(x.head) < size(x.seq);
}

// Whether a block of decode lies in one page, where keys lie in pages.
inline bool decodes_in_pages(const Operand& x) { return x.pages == nullptr || x.page % kDecodeBlock == 0; }

// What a row of an item stands for: its query and head, the keys that causal, window and lengths leave it,
// and where its bias and mask begin (elements from the array's, for key 0).
struct RowInfo {
    std::int64_t begin, end, query, head;
    RowSpans spans;  // where these are not all keys from begin to end
    std::int64_t bias, mask;
    double slope, position;  // ALiBi: adds slope * |position - key|
};

// The same of a tile of rows; and whether O has anything yet.
struct TileKeys {
    RowsRange range;
    std::int64_t next;  // with lists: no row sees a key before it
    bool listed;  // some row has a list of keys
    bool started;
};

struct TileColumns {
    std::int64_t first, last;  // columns of a block of keys in which a tile of rows has weights
};

struct FlashOffsets {
    std::size_t q, k, v, p, o, scores;       // units or accumulators
    std::size_t row_max, row_shift, row_sum;  // accumulators: (rows), (rows), (rows, sums, width)
    std::size_t totals;                      // doubles: O (rows, o_stride), then l (rows, sums)
    std::size_t info, bad, tiles;            // RowInfo (rows), bytes (key_block), TileKeys (tiles of rows)
    std::size_t gathered;                    // of decode, as stored: k (heads, key_block, D), then v
    std::size_t total;
};

// Units of a row of weights in prefill. A panel that begins within one of the packed ones may write beyond
// its end.
inline std::int64_t weight_stride(const FlashPlan& plan, const TileShape& t) {
    return (plan.key_block + t.nr) / t.scalars;
}

// Of the keys of a block; the values come after them.
inline std::int64_t gathered_key_bytes(const AttentionProblem& problem, const FlashPlan& plan) {
    return plan.heads_per_item * plan.key_block * problem.head_dim *
           static_cast<std::int64_t>(item_size(problem.k_dtype));
}

inline FlashOffsets flash_offsets(const AttentionProblem& problem, const FlashPlan& plan,
                                  const TileShape& t) {
    std::size_t at = 0;
    auto take = [&](std::int64_t bytes) {
        const std::size_t start = at;
        at += (static_cast<std::size_t>(bytes) + 63) / 64 * 64;
        return start;
    };
    const std::int64_t u = t.unit_bytes;
    // Prefill has room for whole tiles of rows; an item of decode has the rows of all of its heads.
    const std::int64_t rows = plan.rows_per_item * plan.heads_per_item;
    const std::int64_t keys = (plan.key_block + t.nr - 1) / t.nr * t.nr;
    const std::int64_t panels = (problem.value_dim + t.nr - 1) / t.nr;
    const std::int64_t d_units = (problem.head_dim + t.scalars - 1) / t.scalars;
    FlashOffsets f{};
    f.q = take(rows * plan.q_stride * u);
    if (!plan.decode) {
        f.k = take(keys * d_units * u);
        f.v = take(panels * t.nr * (keys / t.scalars) * u);
        f.p = take(t.mr * weight_stride(plan, t) * u);
        f.scores = take(t.mr * t.nr * u);
    } else {
        f.v = take(keys * t.width * u);  // the columns of v beyond whole vectors
        f.p = take(rows * keys * u);
        f.scores = take(rows * keys * u);
    }
    f.o = take(rows * plan.o_stride * u);
    f.row_max = take(rows * u);
    f.row_shift = take(rows * u);
    f.row_sum = take(rows * t.sums * t.width * u);
    if (plan.section_keys > 0)
        f.totals = take(rows * (plan.o_stride + t.sums) * static_cast<std::int64_t>(sizeof(double)));
    f.info = take(rows * static_cast<std::int64_t>(sizeof(RowInfo)));
    f.bad = take(keys);
    f.tiles = take((rows + t.mr - 1) / t.mr * static_cast<std::int64_t>(sizeof(TileKeys)));
    if (plan.gathers)
        f.gathered = take(gathered_key_bytes(problem, plan) +
                          plan.heads_per_item * plan.key_block * problem.value_dim *
                              static_cast<std::int64_t>(item_size(problem.v_dtype)));
    f.total = at;
    return f;
}

inline std::size_t workspace_bytes(const AttentionProblem& problem, const FlashPlan& plan,
                                   const TileShape& t) {
    return flash_offsets(problem, plan, t).total;
}

}  // namespace
}  // namespace fastattn::cpu
