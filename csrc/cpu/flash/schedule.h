// How a call is cut into work, entry by entry: pure functions of the problem, the entry's lengths, the
// register tile and, for the size of an item only, the number of threads. Row tiles and key blocks start at
// the same places whatever the items are: an entry has the same bits alone, in any batch and on any number of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include <fastattn/attention.h>

#include "core/entry.h"
#include "core/entry_table.h"

namespace fastattn::cpu {

// The register tile of a kernel for one dtype (see engine.h).
struct TileShape {
    int mr = 1;  // query rows
    int nr = 1;  // keys or value columns
    int width = 1;  // lanes of a vector
    int scalars = 1;  // scalars in a unit
    int sums = 1;  // sums of a row's weights
    int unit_bytes = 4;  // bytes of a unit, and of an accumulator
};

inline constexpr std::int64_t kKeyBlock = 256;  // most keys packed at once (prefill)
inline constexpr std::int64_t kDecodeBlock = 64;  // keys scored at once (decode)
inline constexpr std::int64_t kDecodeItemRows = 256;  // most rows of all heads of an item of decode
inline constexpr std::int64_t kSplitKeys = 2048;  // keys of one split (prefill of few rows)
inline constexpr std::int64_t kDecodeSplitKeys = 512;  // the same for decode
inline constexpr std::int64_t kSplitRows = 256;  // at most so many rows have their keys split
inline constexpr std::int64_t kMostSplits = 256;  // of 16 rows: bounds the partial results of long caches

// A running sum of float32 loses what is far below it, and sums of equal terms lose it in the same direction:
// after so many keys it moves to a total in float64.
inline constexpr std::int64_t kSectionKeys = 4096, kDecodeSectionKeys = 1024;

inline constexpr std::int64_t kPartialHeader = 4;  // accumulators before o in a partial result

// Of one entry. All that bits depend on comes from its own lengths, G, D, Dv, dtype and options; rows and
// heads of an item also from the threads and the other entries.
struct FlashPlan {
    bool decode = false;
    std::int64_t rows = 0;  // q_len * G: the rows that share k and v; row r is query r/G, head r%G
    std::int64_t heads_per_item = 1;  // kv heads of an item; above 1 (decode only) it has all rows of each
    std::int64_t head_items = 0;
    std::int64_t rows_per_item = 0;  // multiple of mr in prefill
    std::int64_t row_items = 0;
    std::int64_t key_splits = 1;
    std::int64_t split_keys = 0;  // keys of a split (a multiple of kKeyBlock when key_splits > 1)
    std::int64_t key_block = 0;
    std::int64_t section_keys = 0;  // multiple of key_block; 0: an item's sums need no totals
    std::int64_t items = 0;  // head_items * row_items * key_splits
    std::int64_t merge_items = 0;  // second phase, when key_splits > 1
    std::int64_t q_stride = 0;  // units of a packed q row
    std::int64_t o_stride = 0;  // accumulators of an output row
    std::int64_t partial_stride = 0;  // accumulators of one partial result: m, l, rounded l, o
    bool gathers = false;  // decode: keys or values whose numbers lie apart are copied block by block
    // Decode, an item for each query: rows have few keys, far apart, which are copied block by block. Keys,
    // and with them blocks, splits and sections, are then numbered within the list of the row.
    bool selects = false;
    std::size_t per_thread_bytes = 0;
    std::size_t shared_bytes = 0;
};

FlashPlan plan_flash(const AttentionProblem& problem, const Entry& entry, const TileShape& tile, int threads);

struct FlashEntry {
    Entry lengths;
    FlashPlan plan;
    Phase items, merges;
    std::int64_t shared = 0, shared_size = 0;  // partial results
};

struct FlashSchedule {
    EntryTable<FlashEntry> entries;
    std::int64_t items = 0, merge_items = 0;
    std::int64_t groups = 1;  // neighbouring items that two threads should not share: see Executor
    std::size_t per_thread_bytes = 0, shared_bytes = 0;
};

}  // namespace fastattn::cpu
