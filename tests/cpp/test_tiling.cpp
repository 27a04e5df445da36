// plan_flash: pure arithmetic, checked over a grid of problems.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>

#include "cpu/flash/make_schedule.h"
#include "cpu/flash/schedule.h"
#include "cpu/flash/workspace.h"

namespace fastattn::cpu {
namespace {

constexpr TileShape kWide{6, 64, 16, 1, 1, 4}, kPairs{6, 64, 16, 2, 2, 4}, kNarrow{4, 8, 4, 1, 1, 8};

AttentionProblem problem(std::int64_t batch, std::int64_t q_heads, std::int64_t kv_heads, std::int64_t q_size,
                         std::int64_t kv_size, std::int64_t d, std::int64_t dv) {
    AttentionProblem p;
    p.batch = batch, p.q_heads = q_heads, p.kv_heads = kv_heads,
    p.group = kv_heads == 0 ? 1 : q_heads / kv_heads;
    p.q_size = q_size, p.kv_size = kv_size, p.head_dim = d, p.value_dim = dv;
    p.k.dim = p.v.dim = 1;
    return p;
}

FlashPlan plan_of(const AttentionProblem& p, const TileShape& tile, int threads) {
    return plan_flash(p, {p.q_size, p.kv_size, 0}, tile, threads);
}

TEST(Tiling, ItemsCoverEveryRowOnce) {
    for (const TileShape& tile : {kWide, kPairs, kNarrow}) {
        for (std::int64_t q : {0, 1, 2, 5, 9, 64, 97, 1000, 5000}) {
            for (std::int64_t keys : {0, 1, 63, 256, 5000, 40000}) {
                for (std::int64_t heads : {1, 4}) {
                    for (int threads : {1, 2, 64}) {
                        const AttentionProblem p = problem(2, heads * 2, 2, q, keys, 80, 33);
                        const FlashPlan plan = plan_of(p, tile, threads);
                        EXPECT_EQ(plan.rows, q * heads);
                        EXPECT_GE(plan.row_items * plan.rows_per_item, plan.rows);
                        if (plan.row_items > 0) {
                            EXPECT_LT((plan.row_items - 1) * plan.rows_per_item, plan.rows);
                        }
                        if (!plan.decode) {
                            EXPECT_EQ(plan.rows_per_item % tile.mr, 0);
                        }
                        EXPECT_GE(plan.key_splits * plan.split_keys, keys);
                        if (plan.key_splits > 1) {
                            EXPECT_EQ(plan.split_keys % kKeyBlock, 0);
                        }
                        EXPECT_EQ(plan.items, 2 * plan.row_items * plan.key_splits);
                        EXPECT_EQ(plan.key_block % tile.nr, 0);
                    }
                }
            }
        }
    }
}

// Whatever changes a result - key blocks, splits, which algorithm - is the same for any thread count and
// any batch size.
TEST(Tiling, ResultsDoNotDependOnThreadsOrBatch) {
    for (std::int64_t q : {1, 8, 9, 40, 65, 256, 257, 700}) {
        for (std::int64_t keys : {100, 4095, 4096, 100000}) {
            const FlashPlan one = plan_of(problem(1, 8, 8, q, keys, 64, 64), kWide, 1);
            for (std::int64_t batch : {1, 3, 64}) {
                for (int threads : {1, 2, 7, 128}) {
                    const FlashPlan plan = plan_of(problem(batch, 8, 8, q, keys, 64, 64), kWide, threads);
                    EXPECT_EQ(plan.decode, one.decode);
                    EXPECT_EQ(plan.key_block, one.key_block);
                    EXPECT_EQ(plan.key_splits, one.key_splits);
                    EXPECT_EQ(plan.split_keys, one.split_keys);
                }
            }
        }
    }
}

// 9 to 16 rows from 512 keys on, 17 to 32 where keys and values of a head are at least 12 MiB.
TEST(Tiling, RowsOfDecode) {
    const auto decodes = [](std::int64_t rows, std::int64_t keys) {
        return plan_of(problem(1, 2, 2, rows, keys, 128, 128), kWide, 2).decode;
    };
    const std::int64_t large = (12 << 20) / (256 * 4);
    EXPECT_TRUE(decodes(8, 1) && decodes(8, 511));
    EXPECT_FALSE(decodes(9, 511) || decodes(16, 511));
    EXPECT_TRUE(decodes(9, 512) && decodes(16, 512));
    EXPECT_FALSE(decodes(17, 512) || decodes(17, large - 1));
    EXPECT_TRUE(decodes(17, large) && decodes(32, large));
    EXPECT_FALSE(decodes(33, large));
}

// All heads of a key to an item where they lie side by side, but no more than kDecodeItemRows rows.
TEST(Tiling, HeadsOfDecodeItem) {
    const auto heads = [](std::int64_t kv_heads, std::int64_t rows) {
        AttentionProblem p = problem(1, kv_heads * rows, kv_heads, 1, 16384, 128, 128);
        p.k.seq = p.v.seq = kv_heads * 128;
        p.k.head = p.v.head = 128;
        return plan_of(p, kWide, 1).heads_per_item;
    };
    EXPECT_EQ(heads(8, 4), 8);
    EXPECT_EQ(heads(32, 1), 32);
    EXPECT_EQ(heads(32, 16), 16);
    EXPECT_EQ(heads(8, 32), 8);
    EXPECT_EQ(heads(9, 32), 5);
    EXPECT_EQ(plan_of(problem(1, 8, 8, 1, 16384, 128, 128), kWide, 1).heads_per_item, 1);
}

TEST(Tiling, WorkspaceDoesNotGrowWithTheSequence) {
    const auto bytes = [](std::int64_t s) {
        return plan_of(problem(1, 8, 8, s, s, 128, 128), kWide, 2).per_thread_bytes;
    };
    EXPECT_LT(bytes(4096), std::size_t{2} << 20);
    // From kSectionKeys on there are totals in float64, and no more than these.
    EXPECT_LT(bytes(1 << 20), std::size_t{4} << 20);
    EXPECT_EQ(bytes(std::int64_t{1} << 30), bytes(1 << 20));
    EXPECT_LT(plan_of(problem(1, 1, 1, 8, 8, 16, 16), kWide, 2).per_thread_bytes, std::size_t{16} << 10);
}

TEST(Tiling, BuffersDoNotOverlap) {
    for (std::int64_t q : {1, 7, 300}) {
        for (std::int64_t dv : {1, 33, 128}) {
            const AttentionProblem p = problem(1, 2, 2, q, 500, 40, dv);
            for (const TileShape& tile : {kWide, kPairs, kNarrow}) {
                const FlashPlan plan = plan_of(p, tile, 2);
                const FlashOffsets at = flash_offsets(p, plan, tile);
                EXPECT_EQ(at.total, plan.per_thread_bytes);
                EXPECT_LE(at.q, at.k);
                EXPECT_LE(at.k, at.v);
                EXPECT_LT(at.v, at.p);
                EXPECT_LT(at.p, at.scores);
                EXPECT_LT(at.scores, at.o);
                EXPECT_LT(at.o, at.row_max);
                EXPECT_LT(at.row_max, at.row_sum);
                EXPECT_LT(at.row_sum, at.info);
                EXPECT_LT(at.info, at.bad);
                EXPECT_EQ(at.info % 64, 0u);
            }
        }
    }
}

// Every item of every phase belongs to one entry, in order; alike entries share a row of the table.
TEST(Tiling, ItemsOfEntries) {
    const std::array<std::int64_t, 6> q_lens{1, 0, 70, 3, 300, 0}, kv_lens{5000, 10, 0, 900, 2500, 0};
    AttentionProblem p = problem(6, 4, 2, 300, 5000, 32, 32);
    p.has_q_lens = p.has_kv_lens = true;
    p.q_lens = {q_lens.data(), DType::i64, 1, 0, DeviceType::cpu};
    p.kv_lens = {kv_lens.data(), DType::i64, 1, 0, DeviceType::cpu};
    const ForwardSchedule made(p, kWide, 2);
    const FlashSchedule& all = made.flash();
    ASSERT_EQ(all.entries.count, 6);
    std::int64_t item = 0, merge = 0;
    for (std::int64_t b = 0; b < 6; ++b) {
        const FlashEntry& entry = all.entries.rows[b];
        EXPECT_EQ(entry.lengths.q_len, q_lens[static_cast<std::size_t>(b)]);
        EXPECT_EQ(entry.lengths.offset, entry.lengths.kv_len - entry.lengths.q_len);
        for (std::int64_t i = 0; i < entry.plan.items; ++i, ++item) {
            const auto place = place_of(all.entries, &FlashEntry::items, item);
            EXPECT_EQ(place.entry, &entry);
            EXPECT_EQ(place.batch, b);
            EXPECT_EQ(place.item, i);
            EXPECT_EQ(place.shared % 64, 0);
        }
        for (std::int64_t i = 0; i < entry.plan.merge_items; ++i, ++merge) {
            const auto place = place_of(all.entries, &FlashEntry::merges, merge);
            EXPECT_EQ(place.batch, b);
            EXPECT_EQ(place.item, i);
            EXPECT_LE(static_cast<std::size_t>(place.shared + entry.shared_size), all.shared_bytes);
        }
    }
    EXPECT_EQ(item, all.items);
    EXPECT_EQ(merge, all.merge_items);
    EXPECT_GT(merge, 0);
    EXPECT_NE(made.describe(p, kWide).find("entries: "), std::string::npos);

    p.has_q_lens = p.has_kv_lens = false;
    const ForwardSchedule alike(p, kWide, 2);
    ASSERT_EQ(alike.flash().entries.count, 1);
    const std::int64_t each = alike.flash().items / 6;
    EXPECT_EQ(place_of(alike.flash().entries, &FlashEntry::items, 4 * each + 1).batch, 4);
    EXPECT_EQ(place_of(alike.flash().entries, &FlashEntry::items, 4 * each + 1).item, 1);
}

}  // namespace
}  // namespace fastattn::cpu
