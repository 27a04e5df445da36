// Conditions of a mask: what they make of rows, and what is refused.
#include <fastattn/attention.h>

#include <gtest/gtest.h>

#include <vector>

#include "arrays.h"
#include "core/entries.h"

namespace fastattn::testing {
namespace {

using Kind = MaskCondition::Kind;

// Lists by number: interval after interval.
struct Lists {
    Array<std::int64_t> index, starts, spans;

    Lists(Shape shape, std::vector<std::int64_t> of_row, std::vector<std::vector<std::int64_t>> lists)
        : index(std::move(shape), std::move(of_row)), starts({1}, 0), spans({0, 2}) {
        for (const auto& list : lists) {
            spans.data.insert(spans.data.end(), list.begin(), list.end());
            starts.data.push_back(static_cast<std::int64_t>(spans.data.size()) / 2);
        }
        starts.shape = {static_cast<std::int64_t>(starts.data.size())};
        spans.shape[0] = starts.data.back();
    }
    MaskCondition condition() {
        MaskCondition c;
        c.index = index.view(), c.starts = starts.view(), c.spans = spans.view();
        return c;
    }
};

// The keys of a row of the first entry, one by one.
std::vector<std::int64_t> keys_of(const AttentionProblem& p, std::int64_t h, std::int64_t i) {
    MaskLists lists;
    std::vector<std::int64_t> keys;
    for_each_entry(p, lists, [&](std::int64_t b, const Entry& entry) {
        if (b > 0) return;
        RowSpans list;
        const KeyRange range = row_keys(p, entry, h, i, list);
        for (std::int64_t j = range.begin; j < range.end; ++j)
            if (list.first == nullptr || in_list(list, j)) keys.push_back(j);
    });
    return keys;
}

using Keys = std::vector<std::int64_t>;

class Conditions : public ::testing::Test {
protected:
    Call call{2, 3, 9, 4, 2, 8, 6};
    AttentionParams& p = call.params;

    Keys keys(std::int64_t h, std::int64_t i) { return keys_of(make_problem(p), h, i); }
    std::string error() {
        return message_of<ValueError>([&] { make_problem(p); });
    }
};

TEST_F(Conditions, ListsOfRowsAndHeads) {
    Lists lists({1, 2, 3}, {0, 1, 2, 2, 1, 0}, {{0, 2, 4, 5}, {}, {-3, 40}});
    p.conditions = {lists.condition()};
    p.conditions[0].kv_heads = true;
    EXPECT_EQ(keys(0, 0), (Keys{0, 1, 4}));
    EXPECT_EQ(keys(1, 1), Keys{});
    EXPECT_EQ(keys(1, 2), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8}));
    EXPECT_EQ(keys(2, 2), (Keys{0, 1, 4}));  // query heads 2 and 3 share head 1 of k
    p.causal = true;
    EXPECT_EQ(keys(1, 2), (Keys{0, 1, 2, 3, 4, 5, 6, 7, 8}));
    EXPECT_EQ(keys(2, 0), (Keys{0, 1, 2, 3, 4, 5, 6}));
}

TEST_F(Conditions, FromTheEndAndInBlocksOfRows) {
    Lists lists({1, 1, 2}, {0, 1}, {{-2, 0}, {-9, -7, -1, 0}});
    p.conditions = {lists.condition()};
    p.conditions[0].from_end = true;
    p.conditions[0].row_block = 2;
    EXPECT_EQ(keys(0, 0), (Keys{7, 8}));
    EXPECT_EQ(keys(0, 1), (Keys{7, 8}));
    EXPECT_EQ(keys(3, 2), (Keys{0, 1, 8}));
    Array<std::int64_t> lens({2}, {8, 1});
    p.kv_lens = lens.view();
    EXPECT_EQ(keys(0, 0), (Keys{6, 7}));
}

TEST_F(Conditions, OnPositionsAndTogether) {
    MaskCondition prefix, chunks, window;
    prefix.kind = Kind::prefix, chunks.kind = Kind::chunks, window.kind = Kind::sinks_window;
    Array<std::int64_t> length({2}, {8, 0});
    prefix.lengths = length.view();
    chunks.size = 4;
    window.keep = 2, window.left = 1;
    p.conditions = {prefix};
    EXPECT_EQ(keys(0, 0), (Keys{0, 1, 2, 3, 4, 5, 6, 7}));
    p.conditions = {chunks};
    EXPECT_EQ(keys(0, 0), (Keys{4, 5, 6, 7}));
    p.conditions = {window};
    EXPECT_EQ(keys(0, 0), (Keys{0, 1, 5, 6}));
    p.conditions = {window, prefix, chunks};
    EXPECT_EQ(keys(0, 1), (Keys{6, 7}));
    // Any position: nothing overflows.
    for (const std::int64_t offset : {INT64_MIN, INT64_MIN + 1, INT64_MAX - 1, INT64_MAX}) {
        p.q_offset = offset;
        EXPECT_EQ(keys(0, 0), Keys{});
    }
    p.q_offset = -1;
    p.conditions = {chunks};
    EXPECT_EQ(keys(0, 0), Keys{});
    EXPECT_EQ(keys(0, 1), (Keys{0, 1, 2, 3}));
}

TEST_F(Conditions, OneIntervalIsNoList) {
    Lists lists({1, 1, 1}, {0}, {{0, 3, 3, 7}});
    p.conditions = {lists.condition()};
    p.window_right = 0;
    p.window_left = 2;
    const AttentionProblem made = make_problem(p);
    MaskLists all;
    for_each_entry(made, all, [&](std::int64_t, const Entry& entry) {
        RowSpans list;
        const KeyRange range = row_keys(made, entry, 0, 0, list);  // position 6: keys 4 to 6
        EXPECT_EQ(list.first, nullptr);
        EXPECT_EQ(range.begin, 4);
        EXPECT_EQ(range.end, 7);
    });
}

TEST_F(Conditions, WhatIsRefused) {
    Lists lists({1, 1, 3}, {0, 1, 0}, {{0, 2}, {4, 5}});
    const auto with = [&](auto change) {
        MaskCondition c = lists.condition();
        change(c);
        p.conditions = {c};
        return error();
    };
    EXPECT_EQ(with([](MaskCondition&) {}), "no error");
    EXPECT_NE(with([](MaskCondition& c) { c.row_block = 2; }).find("3 rows (2 blocks of 2)"),
              std::string::npos);
    EXPECT_NE(with([](MaskCondition& c) { c.row_block = 0; }).find("row_block >= 1"), std::string::npos);
    EXPECT_NE(with([](MaskCondition& c) { c.most_keys = 8; }).find("expected Sk = 0 to 8"),
              std::string::npos);
    EXPECT_NE(with([](MaskCondition& c) { c.index.rank = 2; }).find("3 axes"), std::string::npos);
    EXPECT_NE(with([](MaskCondition& c) { c.spans.strides[0] = 3; }).find("in one piece"), std::string::npos);
    lists.index[1] = 2;
    EXPECT_NE(with([](MaskCondition&) {}).find("a list below 2, got 2 for row 1"), std::string::npos);
    lists.index[1] = 0, lists.spans[2] = 1, lists.starts[1] = 2;
    EXPECT_NE(with([](MaskCondition&) {}).find("another order in list 0"), std::string::npos);
    lists.starts[1] = 3;
    EXPECT_NE(with([](MaskCondition&) {}).find("up to 2, got 3 after list 0"), std::string::npos);
    MaskCondition chunks;
    chunks.kind = Kind::chunks;
    p.conditions.assign(9, chunks);
    EXPECT_NE(error().find("at most 8 conditions"), std::string::npos);
    const std::string type = message_of<TypeError>([&] {
        Array<std::int32_t> wrong({1, 1, 1});
        MaskCondition c = lists.condition();
        c.index = wrong.view();
        p.conditions = {c};
        make_problem(p);
    });
    EXPECT_NE(type.find("int64 on the CPU, got int32"), std::string::npos);
}

TEST_F(Conditions, EveryKernelComputesThem) {
    Lists lists({1, 1, 3}, {0, 1, 0}, {{0, 2, 5, 9}, {4, 5}});
    Array<std::uint8_t> mask(
        {3, 9}, {1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1});
    for (const KernelInfo& kernel : kernels()) {
        if (!kernel.usable || kernel.device != "cpu" || kernel.name == "cpu-avx512bf16") continue;
        RunOptions options;
        options.kernel = kernel.name;
        p.mask = {};
        p.conditions = {lists.condition()};
        attention_forward(make_problem(p), options);
        const std::vector<float> found = call.out.data;
        p.conditions.clear();
        p.mask = mask.view();
        attention_forward(make_problem(p), options);
        for (std::size_t n = 0; n < found.size(); ++n)
            EXPECT_NEAR(found[n], call.out[n], 1e-5f) << kernel.name;
    }
}

}  // namespace
}  // namespace fastattn::testing
