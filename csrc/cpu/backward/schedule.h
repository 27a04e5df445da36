// How the backward pass is cut into work. Sums over keys are taken chunk by chunk and the chunks added in
// order, whether one item computes all chunks of a head or each is an item of its own: so results do not
// depend on the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include <fastattn/attention.h>

#include "cpu/flash/schedule.h"

namespace fastattn::cpu {

inline constexpr std::int64_t kBackwardKeys = 576;  // keys of a block, packed once for all rows of a head
inline constexpr std::int64_t kBackwardRows = 192;  // rows of a block
inline constexpr std::int64_t kMostChunks = 8;  // of the keys
inline constexpr std::int64_t kRowsPerPreparation = 64;
// Blocks after which float32 sums move to totals in float64 (see kSectionKeys): of rows for dk and dv, of
// keys for dq. For dbias, any of its blocks, each a single term of a sum.
inline constexpr std::int64_t kSectionBlocks = 64, kBiasSectionBlocks = 16;

// Of one entry: its rows and keys alone. Only `split` looks at threads and at the other entries: `heads` of
// its size are as much work as the whole call.
struct BackwardPlan {
    std::int64_t key_block = 0, row_block = 0;  // multiples of the register tile's sides
    std::int64_t key_blocks = 0, row_blocks = 0;  // of a head
    std::int64_t chunk_blocks = 0, chunks = 1;  // key blocks of a chunk
    bool sections = false, dq_sections = false, bias_sections = false;  // totals: of dk and dv, dq, dbias
    bool split = false;  // an item per chunk, else per kv head
    std::int64_t items = 0, merge_items = 0;
    std::int64_t q_units = 0, v_units = 0;  // units of a row of q (D), of dout (Dv)
    std::int64_t d_stride = 0, v_stride = 0;  // accumulators of a row of dq and dk, of dv
    std::int64_t dq_size = 0;  // accumulators of dq of all rows of a kv head
    std::int64_t weight_stride = 0;  // units of a row (of rows) of P and dS
    std::int64_t ds_stride = 0;  // units of a row of dS as the product with k takes it
    std::int64_t partial_bytes = 0;  // dq of the chunks
    // With lists: the keys that a block of rows sees, from the first to the last; null: not known.
    const KeyRange* hulls = nullptr;
    std::int64_t hull_head = 0;  // stride
};

BackwardPlan plan_backward(const BackwardProblem& problem, const Entry& entry, const TileShape& tile,
                           int threads, double heads);

struct BackwardEntry {
    Entry lengths;
    BackwardPlan plan, bias_plan;  // bias_plan: the blocks of dbias, where entries are packed
    Phase prepares, items, merges, biases;  // biases: of packed entries
    std::int64_t shared = 0, shared_size = 0;  // dq of the chunks, with split
};

struct BackwardSchedule {
    EntryTable<BackwardEntry> entries;
    bool packed = false;
    BackwardPlan whole;  // of the arrays' sizes: the blocks of dbias, which padded entries share
    std::int64_t items = 0, merge_items = 0, prepare_items = 0, head_items = 0, bias_items = 0;
    std::int64_t groups = 1;  // of items: see Executor
    std::int64_t most_chunks = 1;  // of an entry
    std::size_t states = 0, slopes = 0;  // where these begin in the shared workspace
    std::size_t bias_sums =
        0;  // of packed entries, where dbias tells neither rows nor keys apart: (entry, head)
    std::size_t per_thread_bytes = 0, shared_bytes = 0;
};

// The workspace of one thread; one walk gives offsets and total.
struct BackwardOffsets {
    std::size_t k_panels, v_panels, k_rows;  // units
    std::size_t q_rows, dout_rows, q_panels, dout_panels;  // units
    std::size_t weights, ds, ds_rows;  // units
    std::size_t x, p, kept, dp, cap;  // accumulators: (mr, nr)
    std::size_t dk, dv, dq, dq_chunk, dbias;  // accumulators
    std::size_t totals, dq_total, dbias_total;  // doubles; totals: dk, then dv
    std::size_t states;  // accumulators: (rows, 3)
    std::size_t info, tiles, bad_k, bad_q, bad_dout;
    std::size_t total;
};
BackwardOffsets backward_offsets(const BackwardProblem& problem, const BackwardPlan& plan,
                                 const TileShape& tile);

}  // namespace fastattn::cpu
