// How a problem is cut into chunks, and how their heads become rows of one product: pure functions, no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <random>
#include <vector>

#include "cuda/host/chunking.h"

namespace fastattn::cuda {
namespace {

AttentionProblem problem(Index batch, Index kv_heads, Index group, Index q_size, Index kv_size,
                         DType dtype = DType::f32) {
    AttentionProblem p;
    p.dtype = dtype;
    p.lse_dtype = dtype == DType::f64 ? DType::f64 : DType::f32;
    p.batch = batch, p.kv_heads = kv_heads, p.group = group, p.q_heads = kv_heads * group;
    p.q_size = q_size, p.kv_size = kv_size, p.head_dim = p.value_dim = 64;
    return p;
}

std::vector<Chunk> chunks_of(const AttentionProblem& p, const Chunk& region, std::size_t limit) {
    std::vector<Chunk> all;
    Chunks walk(p, region, limit);
    for (Chunk chunk; walk.next(chunk);) all.push_back(chunk);
    return all;
}

HeadOperand per_entry(const std::vector<std::int64_t>& values) {
    return {values.data(), DType::i64, 1, 0, DeviceType::cpu};
}

TEST(Scores, LimitIsAPartOfTheCacheButNeitherTinyNorHuge) {
    constexpr std::size_t MiB = std::size_t{1} << 20;
    EXPECT_EQ(score_limit(50 * MiB), 20 * MiB);   // two fifths
    EXPECT_EQ(score_limit(126 * MiB), 24 * MiB);  // more does not help
    EXPECT_EQ(score_limit(6 * MiB), 4 * MiB);
    EXPECT_EQ(score_limit(MiB), MiB);  // never more than there is
}

TEST(Scores, RowsAreApartByAMultipleOfEight) {
    EXPECT_EQ(score_stride(0), 8);
    EXPECT_EQ(score_stride(1), 8);
    EXPECT_EQ(score_stride(8), 8);
    EXPECT_EQ(score_stride(9), 16);
    Chunk chunk{0, 2, 0, 3, 0, 5, 0, 9};
    EXPECT_EQ(score_bytes(problem(2, 3, 4, 5, 9), chunk), 2u * 3 * 4 * 5 * 16 * 4);
    EXPECT_EQ(score_bytes(problem(2, 3, 4, 5, 9, DType::bf16), chunk), 2u * 3 * 4 * 5 * 16 * 4);
    EXPECT_EQ(score_bytes(problem(2, 3, 4, 5, 9, DType::f64), chunk), 2u * 3 * 4 * 5 * 16 * 8);
}

// ---- random problems ----------------------------------------------------------------------------
struct Sample {
    AttentionProblem p;
    Chunk region;
    std::size_t limit = 0;
    std::vector<std::int64_t> q_lens, kv_lens, offsets;

    explicit Sample(unsigned seed) {
        std::mt19937 rng(seed);
        const auto pick = [&](std::initializer_list<Index> from) {
            return from.begin()[rng() % from.size()];
        };
        const auto below = [&](Index n) { return static_cast<Index>(rng() % static_cast<std::uint64_t>(n)); };
        p = problem(1 + below(4), 1 + below(4), pick({1, 2, 3, 8}), pick({1, 2, 7, 33, 130, 300, 1100}),
                    pick({0, 1, 9, 64, 300, 513, 1500}), pick({0, 1}) != 0 ? DType::f32 : DType::f64);
        p.causal = below(2) != 0;
        if (below(3) == 0) p.window_left = pick({0, 1, 40, 1000, INT64_MAX});
        if (below(3) == 0) p.window_right = pick({0, 5, 200, INT64_MAX});
        const auto values = [&](std::vector<std::int64_t>& to, Index low, Index high) {
            for (Index b = 0; b < p.batch; ++b) to.push_back(low + below(high - low + 1));
            return per_entry(to);
        };
        if (below(3) == 0) p.q_lens = values(q_lens, 0, p.q_size), p.has_q_lens = true;
        if (below(2) == 0) p.kv_lens = values(kv_lens, 0, p.kv_size), p.has_kv_lens = true;
        if (below(3) == 0) {
            p.has_q_offset = true;
            p.q_offset = pick({0, 3, -20, 700, INT64_MIN, INT64_MAX});
            if (below(2) == 0) p.q_offsets = values(offsets, -50, 500);
        }
        const auto range = [&](Index n, Index& first, Index& count) {
            first = below(n);
            count = below(3) == 0 ? 1 + below(n - first) : n - first;
        };
        range(p.batch, region.batch, region.batches);
        range(p.kv_heads, region.kv_head, region.kv_heads);
        range(p.q_size, region.row, region.rows);
        limit = static_cast<std::size_t>(pick({0, 100, 4 << 10, 64 << 10, 1 << 20, 64 << 20}));
    }
    Sample(const Sample&) = delete;
    Sample& operator=(const Sample&) = delete;
};

TEST(Chunks, CoverEveryRowOnceWithinTheLimit) {
    for (unsigned seed = 0; seed < 400; ++seed) {
        SCOPED_TRACE(seed);
        const Sample s(seed);
        const Chunk& r = s.region;
        std::vector<int> seen(static_cast<std::size_t>(r.batches * r.kv_heads * r.rows));
        for (const Chunk& c : chunks_of(s.p, r, s.limit)) {
            ASSERT_GE(std::min({c.batches, c.kv_heads, c.rows}), 1);
            ASSERT_TRUE(c.batch >= r.batch && c.batch + c.batches <= r.batch + r.batches);
            ASSERT_TRUE(c.kv_head >= r.kv_head && c.kv_head + c.kv_heads <= r.kv_head + r.kv_heads);
            ASSERT_TRUE(c.row >= r.row && c.row + c.rows <= r.row + r.rows);
            for (Index b = c.batch; b < c.batch + c.batches; ++b)
                for (Index h = c.kv_head; h < c.kv_head + c.kv_heads; ++h)
                    for (Index i = c.row; i < c.row + c.rows; ++i)
                        ++seen[static_cast<std::size_t>(
                            ((b - r.batch) * r.kv_heads + h - r.kv_head) * r.rows + i - r.row)];
            if (score_bytes(s.p, c) > s.limit) {
                ASSERT_EQ(c.batches * c.kv_heads * c.rows, 1);
            }
            if (c.batches > 1) {
                ASSERT_EQ(c.kv_heads, r.kv_heads);
            }
        }
        ASSERT_EQ(std::count(seen.begin(), seen.end(), 1), static_cast<std::ptrdiff_t>(seen.size()));
    }
}

// No key is missing and none is there that nobody needs, but for the alignment of the first.
TEST(Chunks, KeysAreTheUnionOfTheRanges) {
    for (unsigned seed = 0; seed < 400; ++seed) {
        SCOPED_TRACE(seed);
        const Sample s(seed);
        for (const Chunk& c : chunks_of(s.p, s.region, s.limit)) {
            Index begin = s.p.kv_size, end = 0;
            for (Index b = c.batch; b < c.batch + c.batches; ++b) {
                for (Index i = c.row; i < c.row + c.rows; ++i) {
                    const KeyRange range = s.p.key_range(b, i);
                    if (range.begin == range.end) continue;
                    begin = std::min(begin, range.begin);
                    end = std::max(end, range.end);
                }
            }
            ASSERT_EQ(c.key, end == 0 ? 0 : begin / 8 * 8);
            ASSERT_EQ(c.key + c.keys, end);
        }
    }
}

TEST(Chunks, LargeLimitTakesAllAtOnce) {
    const AttentionProblem p = problem(3, 2, 4, 100, 200);
    const std::vector<Chunk> all = chunks_of(p, whole(p), std::size_t{1} << 30);
    ASSERT_EQ(all.size(), 1u);
    EXPECT_EQ(all[0].batches, 3);
    EXPECT_EQ(all[0].kv_heads, 2);
    EXPECT_EQ(all[0].rows, 100);
    EXPECT_EQ(all[0].keys, 200);
}

TEST(Chunks, CausalComputesLittleInVain) {
    for (const Index size : {1024, 2000, 4096, 8192}) {
        for (const Index group : {1, 4}) {
            AttentionProblem p = problem(1, 2, group, size, size);
            p.causal = true;
            double computed = 0, needed = 0;
            for (const Chunk& c : chunks_of(p, whole(p), score_limit(std::size_t{50} << 20)))
                computed += static_cast<double>(c.kv_heads * c.rows * c.keys);
            for (Index i = 0; i < size; ++i) needed += static_cast<double>(p.kv_heads * (i + 1));
            EXPECT_LE(computed, 1.6 * needed) << size;
        }
    }
}

TEST(Chunks, EntriesWithLengthsOfTheirOwnStayApartWhereKeysAreMany) {
    const auto entries_at_most = [](Index kv_size, bool lens) {
        AttentionProblem p = problem(2, 2, 1, 4, kv_size);
        const std::vector<std::int64_t> lengths{kv_size, 9};
        if (lens) p.kv_lens = per_entry(lengths), p.has_kv_lens = true;
        Index most = 0, keys = 0;
        for (const Chunk& c : chunks_of(p, whole(p), std::size_t{1} << 30)) {
            most = std::max(most, c.batches);
            keys += c.batches * c.keys;
        }
        EXPECT_EQ(keys, most == 1 ? kv_size + 9 : 2 * kv_size);
        return most;
    };
    EXPECT_EQ(entries_at_most(4096, true), 1);
    EXPECT_EQ(entries_at_most(4096, false), 2);
    EXPECT_EQ(entries_at_most(64, true), 2);
}

// Neither read, which would crash here, nor trusted to be the sizes.
TEST(Chunks, LengthsOnTheDeviceWidenToAllKeys) {
    for (const auto side :
         {&AttentionProblem::q_lens, &AttentionProblem::kv_lens, &AttentionProblem::q_offsets}) {
        AttentionProblem p = problem(2, 1, 1, 300, 600);
        p.causal = true;
        p.window_left = 10;
        p.*side = {reinterpret_cast<const void*>(std::uintptr_t{16}), DType::i64, 1, 0, DeviceType::cuda};
        p.has_q_lens = p.q_lens.data != nullptr;
        p.has_kv_lens = p.kv_lens.data != nullptr;
        p.has_q_offset = p.q_offsets.data != nullptr;
        for (const Chunk& c : chunks_of(p, whole(p), 64 << 10)) {
            EXPECT_EQ(c.key, 0);
            EXPECT_EQ(c.keys, 600);
        }
    }
}

TEST(Chunks, EmptyProblems) {
    for (const AttentionProblem& p : {problem(0, 2, 1, 3, 3), problem(2, 0, 1, 3, 3), problem(2, 2, 1, 0, 3)})
        EXPECT_TRUE(chunks_of(p, whole(p), 1000).empty());
    const AttentionProblem no_keys = problem(2, 2, 1, 3, 0);  // rows to be written all the same
    const std::vector<Chunk> all = chunks_of(no_keys, whole(no_keys), 1000);
    ASSERT_EQ(all.size(), 1u);
    EXPECT_EQ(all[0].keys, 0);
    EXPECT_EQ(all[0].rows, 3);
}

TEST(Chunks, Restricted) {
    EXPECT_FALSE(is_restricted(problem(1, 1, 1, 4, 4)));
    const auto restricted = [](auto set) {
        AttentionProblem p = problem(1, 1, 1, 4, 4);
        set(p);
        return is_restricted(p);
    };
    char something = 0;
    EXPECT_TRUE(restricted([](AttentionProblem& p) { p.causal = true; }));
    EXPECT_TRUE(restricted([](AttentionProblem& p) { p.window_left = 0; }));
    EXPECT_TRUE(restricted([](AttentionProblem& p) { p.window_right = 0; }));
    EXPECT_TRUE(restricted([&](AttentionProblem& p) { p.mask.data = &something; }));
    EXPECT_TRUE(restricted([&](AttentionProblem& p) { p.bias.data = &something; }));
    EXPECT_TRUE(restricted([](AttentionProblem& p) { p.has_q_lens = true; }));
    EXPECT_TRUE(restricted([](AttentionProblem& p) { p.has_kv_lens = true; }));
    EXPECT_FALSE(restricted([](AttentionProblem& p) { p.has_q_offset = true; }));
}

// ---- how heads become rows ------------------------------------------------------------------------
Operand bshd(Index seq, Index heads, Index dims) {
    return {nullptr, seq * heads * dims, heads * dims, dims, 1};
}
Operand bhsd(Index seq, Index heads, Index dims) {
    return {nullptr, seq * heads * dims, dims, seq * dims, 1};
}

// The fold for q and out of the same layout in a chunk of `rows` rows.
Fold fold(const AttentionProblem& p, Index rows, Operand (*layout)(Index, Index, Index)) {
    const Chunk chunk{0, p.batch, 0, p.kv_heads, 0, rows, 0, p.kv_size};
    return fold_of(p, layout(p.q_size, p.q_heads, p.head_dim), layout(p.q_size, p.q_heads, p.value_dim),
                   chunk);
}

TEST(Fold, FollowsTheLayout) {
    const AttentionProblem mha = problem(2, 4, 1, 10, 20), gqa = problem(2, 2, 4, 10, 20),
                           mqa = problem(2, 1, 4, 10, 20);
    EXPECT_EQ(fold(mha, 10, bshd), Fold::outer);
    EXPECT_EQ(fold(mha, 10, bhsd), Fold::outer);
    EXPECT_EQ(fold(mqa, 10, bshd), Fold::inner);  // all heads of a position are one group
    EXPECT_EQ(fold(mqa, 4, bshd), Fold::inner);
    EXPECT_EQ(fold(gqa, 10, bshd), Fold::none);
    EXPECT_EQ(fold(gqa, 1, bshd), Fold::inner);  // decode
    EXPECT_EQ(fold(gqa, 10, bhsd), Fold::outer);
    EXPECT_EQ(fold(gqa, 5, bhsd), Fold::none);  // half of the rows: the next head begins elsewhere
    EXPECT_EQ(fold(gqa, 1, bhsd), Fold::inner);
}

TEST(Fold, NeedsBothArraysAndHeadsApart) {
    const AttentionProblem mqa = problem(2, 1, 4, 10, 20), decode = problem(2, 2, 4, 1, 20);
    const Chunk all = whole(mqa), row = whole(decode);
    const Operand inner = bshd(10, 4, 64), outer = bhsd(10, 4, 64);
    EXPECT_EQ(fold_of(mqa, inner, outer, all), Fold::none);
    EXPECT_EQ(fold_of(mqa, outer, inner, all), Fold::none);
    Operand same_head = bshd(10, 4, 64);
    same_head.head = 0;
    EXPECT_EQ(fold_of(mqa, same_head, inner, all), Fold::none);
    EXPECT_EQ(fold_of(decode, same_head, bshd(1, 8, 64), row), Fold::none);
    Operand all_one = same_head;  // positions and heads: 0 == rows * 0 must not pass for folding
    all_one.seq = 0;
    EXPECT_EQ(fold_of(mqa, all_one, outer, all), Fold::none);
    Operand reversed = bshd(1, 8, 64);
    reversed.head = -64;
    EXPECT_EQ(fold_of(decode, reversed, bshd(1, 8, 64), row), Fold::none);
}

// ---- operands -------------------------------------------------------------------------------------
TEST(Operands, WhatCublasCanRead) {
    alignas(64) static std::byte memory[64];
    Operand x = bshd(10, 4, 64);
    x.data = memory;
    for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
        EXPECT_TRUE(is_gemm_operand(x, dtype, 10, 64)) << dtype_name(dtype);
    const auto with = [&](auto set) {
        Operand y = x;
        set(y);
        return y;
    };
    EXPECT_FALSE(is_gemm_operand(with([](Operand& y) { y.dim = 2; }), DType::f32, 10, 64));
    EXPECT_FALSE(is_gemm_operand(with([](Operand& y) { y.dim = -1; }), DType::f32, 10, 64));
    EXPECT_TRUE(is_gemm_operand(with([](Operand& y) { y.dim = 2; }), DType::f32, 10, 1));
    EXPECT_FALSE(is_gemm_operand(with([](Operand& y) { y.seq = 63; }), DType::f32, 10, 64));
    EXPECT_FALSE(is_gemm_operand(with([](Operand& y) { y.seq = 0; }), DType::f32, 10, 64));
    EXPECT_FALSE(is_gemm_operand(with([](Operand& y) { y.seq = -256; }), DType::f32, 10, 64));
    EXPECT_TRUE(is_gemm_operand(with([](Operand& y) { y.seq = 0; }), DType::f32, 1, 64));
    EXPECT_TRUE(is_gemm_operand(with([](Operand& y) { y.head = 0; }), DType::f16, 10, 64));  // broadcast
    // Steps of 16 bytes are asked of 16-bit types only.
    for (const auto side : {&Operand::batch, &Operand::seq, &Operand::head}) {
        const Operand odd = with([&](Operand& y) { y.*side += 4; });
        EXPECT_TRUE(is_gemm_operand(odd, DType::f32, 10, 64));
        EXPECT_FALSE(is_gemm_operand(odd, DType::f16, 10, 64));
    }
    const Operand shifted = with([](Operand& y) { y.data = static_cast<std::byte*>(y.data) + 8; });
    EXPECT_TRUE(is_gemm_operand(shifted, DType::f32, 10, 64));
    EXPECT_FALSE(is_gemm_operand(shifted, DType::bf16, 10, 64));
}

TEST(Operands, CompactCopiesAreReadableAndInTheIndicesOfTheProblem) {
    alignas(64) static std::byte memory[64];
    const Chunk region{3, 2, 5, 2, 7, 4, 0, 0};
    const auto item = [](DType dtype) { return static_cast<Index>(item_size(dtype)); };
    for (const DType dtype : {DType::f64, DType::f32, DType::f16}) {
        for (const Index dims : {1, 5, 8, 33}) {
            const Index heads = 6, rows = 4;
            const Operand x = compact_operand(memory, dtype, region, 15, heads, 7, rows, dims);
            EXPECT_TRUE(is_gemm_operand(x, dtype, rows, dims));
            EXPECT_EQ(x.seq * item(dtype) % 16, 0);
            EXPECT_LT((x.seq - dims) * item(dtype), 16);
            const auto offset = [&](Index b, Index h, Index s) {
                const Index at = b * x.batch + h * x.head + s * x.seq;
                return static_cast<Index>(reinterpret_cast<std::uintptr_t>(x.data) -
                                          reinterpret_cast<std::uintptr_t>(memory)) +
                       at * item(dtype);
            };
            EXPECT_EQ(offset(3, 15, 7), 0);
            EXPECT_EQ(offset(3, 15, 8), x.seq * item(dtype));
            EXPECT_EQ(offset(3, 16, 7), rows * x.seq * item(dtype));
            EXPECT_EQ(offset(4, 15, 7), heads * rows * x.seq * item(dtype));
            EXPECT_EQ(static_cast<std::size_t>(offset(4, 20, 10) + x.seq * item(dtype)),
                      compact_bytes(dtype, 2, heads, rows, dims));
        }
    }
}

}  // namespace
}  // namespace fastattn::cuda
