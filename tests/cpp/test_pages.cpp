// Keys in pages: what they are, and what is refused.
#include <fastattn/attention.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "arrays.h"
#include "core/keys.h"

namespace fastattn::testing {
namespace {

// Two entries of 7 and 3 keys in five pages of 4, of 2 heads; 2 rows each.
class Pages : public ::testing::Test {
protected:
    Array<float> q = random_array<float>({2, 2, 4, 8}, 1), k = random_array<float>({5, 4, 2, 8}, 2),
                 v = random_array<float>({5, 4, 2, 6}, 3), out{{2, 2, 4, 6}};
    Array<std::int64_t> table{{2, 2}, {4, 1, 2, 99}}, lens{{2}, {7, 3}};
    AttentionParams p;

    void SetUp() override {
        p.q = q.view(), p.k = k.view(), p.v = v.view(), p.out = out.view();
        p.block_table = table.view(), p.kv_lens = lens.view();
    }
    std::string error() {
        return message_of<ValueError>([&] { make_problem(p); });
    }
};

TEST_F(Pages, KeysAreFoundByTheTable) {
    const AttentionProblem made = make_problem(p);
    EXPECT_TRUE(made.paged());
    EXPECT_EQ(made.batch, 2);
    EXPECT_EQ(made.kv_size, 7);  // the longest entry's
    const KeyRows<float> rows(made.k, 0, 1);
    EXPECT_EQ(rows[0], k.data.data() + 4 * 4 * 2 * 8 + 8);
    EXPECT_EQ(rows[5], k.data.data() + 1 * 4 * 2 * 8 + 2 * 8 + 8);
    EXPECT_EQ(rows.run(1, 9).count, 3);
    const KeyPointers<float, 8> pointers(rows, 2, 5);
    for (std::int64_t i = 0; i < 5; ++i) EXPECT_EQ(pointers[i], rows[2 + i]);
    EXPECT_EQ(KeyRows<float>(made.k, 1, 0)[2], k.data.data() + 2 * 4 * 2 * 8 + 2 * 2 * 8);
}

TEST_F(Pages, TheResultIsThatOfKeysInOnePiece) {
    p.causal = true;
    attention_forward(make_problem(p));
    for (std::int64_t b = 0; b < 2; ++b) {
        const std::int64_t n = lens[static_cast<std::size_t>(b)];
        Array<float> keys({n, 2, 8}), values({n, 2, 6}), alone({2, 4, 6});
        for (std::int64_t j = 0; j < n; ++j) {
            const std::int64_t row = table[static_cast<std::size_t>(2 * b + j / 4)] * 4 + j % 4;
            std::copy_n(k.data.begin() + row * 16, 16, keys.data.begin() + j * 16);
            std::copy_n(v.data.begin() + row * 12, 12, values.data.begin() + j * 12);
        }
        AttentionParams one;
        one.q = make_view(q.data.data() + b * 2 * 4 * 8, DType::f32, {2, 4, 8}, {32, 8, 1});
        one.k = keys.view(), one.v = values.view(), one.out = alone.view(), one.causal = true;
        attention_forward(make_problem(one));
        for (std::size_t x = 0; x < alone.data.size(); ++x)
            EXPECT_EQ(alone[x], out[static_cast<std::size_t>(b) * alone.data.size() + x]);
    }
}

TEST_F(Pages, WhatIsRefused) {
    EXPECT_EQ(error(), "no error");  // page 99 lies beyond the 3 keys of entry 1
    lens[1] = 5;
    EXPECT_EQ(error(), "block_table: expected pages below 5, got 99 for page 1 of entry 1");
    lens[1] = 9;
    EXPECT_NE(error().find("kv_lens"), std::string::npos);
    lens[1] = 3;
    table[0] = -1;
    EXPECT_EQ(error(), "block_table: expected pages below 5, got -1 for page 0 of entry 0");
    table[0] = 4;
    p.kv_lens = {};
    EXPECT_NE(error().find("kv_lens: expected the lengths of the entries beside pages"), std::string::npos);
    p.kv_lens = lens.view();
    p.block_table.shape[0] = 1;
    EXPECT_NE(error().find("block_table"), std::string::npos);
    p.block_table = table.view();
    p.k.rank = 3;
    EXPECT_NE(error().find("k: expected pages with 4 axes"), std::string::npos);
    p.k = k.view();
    BackwardParams backward;
    backward.forward = p;
    EXPECT_NE(message_of<ValueError>([&] { make_backward_problem(backward); }).find("there are no gradients"),
              std::string::npos);
}

}  // namespace
}  // namespace fastattn::testing
