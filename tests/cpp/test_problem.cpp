#include <fastattn/attention.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "arrays.h"
#include "core/flops.h"
#include "core/memory_overlap.h"

namespace fastattn::testing {
namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

class Problem : public ::testing::Test {
protected:
    Call call{2, 5, 7, 4, 2, 8, 6};
    AttentionParams& p = call.params;

    std::string value_error() {
        return message_of<ValueError>([&] { make_problem(p); });
    }
    std::string type_error() {
        return message_of<TypeError>([&] { make_problem(p); });
    }
};

TEST_F(Problem, TakesSizesAndStridesFromBshd) {
    const AttentionProblem made = make_problem(p);
    EXPECT_EQ(made.batch, 2);
    EXPECT_EQ(made.q_size, 5);
    EXPECT_EQ(made.kv_size, 7);
    EXPECT_EQ(made.q_heads, 4);
    EXPECT_EQ(made.kv_heads, 2);
    EXPECT_EQ(made.group, 2);
    EXPECT_EQ(made.head_dim, 8);
    EXPECT_EQ(made.value_dim, 6);
    EXPECT_EQ(made.q.batch, 5 * 4 * 8);
    EXPECT_EQ(made.q.seq, 4 * 8);
    EXPECT_EQ(made.q.head, 8);
    EXPECT_EQ(made.q.dim, 1);
    EXPECT_EQ(made.scale, 1 / std::sqrt(8.0));
    EXPECT_EQ(made.window_left, -1);
    EXPECT_EQ(made.lse_dtype, DType::f32);
}

TEST_F(Problem, OtherLayoutsAndRanks) {
    Array<float> q({4, 5, 8}), k({2, 7, 8}), v({2, 7, 6}), out({4, 5, 6});
    AttentionParams bhsd;
    bhsd.layout = Layout::bhsd;
    bhsd.q = q.view();
    bhsd.k = k.view();
    bhsd.v = v.view();
    bhsd.out = out.view();
    const AttentionProblem rank3 = make_problem(bhsd);
    EXPECT_EQ(rank3.batch, 1);
    EXPECT_EQ(rank3.q_heads, 4);
    EXPECT_EQ(rank3.q_size, 5);
    EXPECT_EQ(rank3.q.head, 40);
    EXPECT_EQ(rank3.q.seq, 8);

    Array<double> m({5, 8}), n({7, 8}), w({7, 6}), o({5, 6}), lse({5}), weights({5, 7});
    AttentionParams matrix;
    matrix.q = m.view();
    matrix.k = n.view();
    matrix.v = w.view();
    matrix.out = o.view();
    matrix.lse = lse.view();
    matrix.weights = weights.view();
    const AttentionProblem rank2 = make_problem(matrix);
    EXPECT_EQ(rank2.q_heads, 1);
    EXPECT_EQ(rank2.kv_size, 7);
    EXPECT_EQ(rank2.lse_dtype, DType::f64);
    EXPECT_EQ(rank2.lse.query, 1);
    EXPECT_EQ(rank2.weights.query, 7);
    EXPECT_EQ(rank2.weights.key, 1);
}

TEST_F(Problem, RanksMustAgree) {
    p.q.rank = 5;
    EXPECT_EQ(value_error(), "q: expected 2, 3 or 4 axes, got 5 with shape (2, 5, 4, 8, ...)");
    const std::int64_t sizes[] = {2, 5, 4, 8, 1};
    p.q.full_shape = sizes;
    EXPECT_EQ(value_error(), "q: expected 2, 3 or 4 axes, got 5 with shape (2, 5, 4, 8, 1)");
    p.q.full_shape = nullptr;
    p.q.rank = 1;
    EXPECT_EQ(value_error(), "q: expected 2, 3 or 4 axes, got 1 with shape (2,)");
    p.q.rank = 4;
    p.k.rank = 3;
    EXPECT_EQ(value_error(), "k: expected 4 axes to match q (2, 5, 4, 8), got 3 with shape (2, 7, 2)");
    p.k = TensorView{};
    EXPECT_EQ(value_error(), "k: expected an array, got none");
}

TEST_F(Problem, ShapesMustMatch) {
    Array<float> k({2, 7, 2, 9}), v({2, 6, 2, 6}), out({2, 5, 4, 8});
    p.k = k.view();
    EXPECT_EQ(value_error(), "k: expected shape (2, *, Hkv, 8) to match q (2, 5, 4, 8), got (2, 7, 2, 9)");
    p.k = call.k.view();
    p.v = v.view();
    EXPECT_EQ(value_error(), "v: expected shape (2, 7, 2, *) to match k (2, 7, 2, 8), got (2, 6, 2, 6)");
    p.v = call.v.view();
    p.out = out.view();
    EXPECT_EQ(value_error(), "out: expected shape (2, 5, 4, 6) to match q (2, 5, 4, 8), got (2, 5, 4, 8)");
    p.out = TensorView{};
    EXPECT_EQ(value_error(), "out: expected an array for the result, got none");
    EXPECT_NO_THROW(make_problem(p, false));
}

TEST_F(Problem, HeadsMustDivide) {
    Call odd(2, 5, 7, 4, 3, 8, 6);
    EXPECT_EQ(message_of<ValueError>([&] { make_problem(odd.params); }),
              "k: expected a number of heads that divides the 4 of q (2, 5, 4, 8), got 3 in (2, 7, 3, 8)");
    Call none(2, 5, 7, 4, 0, 8, 6), no_queries(2, 5, 7, 0, 2, 8, 6), neither(2, 5, 7, 0, 0, 8, 6);
    EXPECT_NE(message_of<ValueError>([&] { make_problem(none.params); }).find("got 0 in"), std::string::npos);
    // No heads are a multiple of any number.
    EXPECT_EQ(make_problem(no_queries.params).group, 0);
    EXPECT_NO_THROW(attention_forward(make_problem(no_queries.params)));
    EXPECT_EQ(make_problem(neither.params).group, 1);
}

TEST_F(Problem, ZeroSizesAreLegalButNotForTheHeadDimension) {
    for (const auto& [b, sq, sk] : {std::tuple{0, 5, 7}, {2, 0, 7}, {2, 5, 0}}) {
        Call empty(b, sq, sk, 4, 2, 8, 6);
        EXPECT_NO_THROW(make_problem(empty.params));
    }
    Call no_dim(2, 5, 7, 4, 2, 0, 6), no_value(2, 5, 7, 4, 2, 8, 0);
    EXPECT_EQ(message_of<ValueError>([&] { make_problem(no_dim.params); }),
              "q: expected a head dimension >= 1, got shape (2, 5, 4, 0)");
    EXPECT_EQ(message_of<ValueError>([&] { make_problem(no_value.params); }),
              "v: expected a head dimension >= 1, got shape (2, 7, 2, 0)");
}

TEST_F(Problem, DtypesMustAgree) {
    p.k.dtype = DType::f64;
    EXPECT_EQ(type_error(), "k: expected float32 to match q, got float64");
    p.k.dtype = DType::f32;
    p.q.dtype = DType::i32;
    EXPECT_EQ(type_error(), "q: expected a float dtype, got int32");
    p.q.dtype = DType::f32;
    p.out.dtype = DType::f16;
    EXPECT_EQ(type_error(), "out: expected float32 to match q, got float16");
}

TEST_F(Problem, DevicesMustAgree) {
    p.v.device = {DeviceType::cuda, 1};
    EXPECT_EQ(value_error(), "v: expected an array on cpu as q is, got one on cuda:1");
}

TEST_F(Problem, MasksBroadcastRightAligned) {
    Array<std::uint8_t> keys({7}), rows({5, 1}), heads({4, 1, 1}), full({2, 4, 5, 7}), scalar(Shape{});
    p.mask = keys.view();
    AttentionProblem made = make_problem(p);
    EXPECT_EQ(made.mask.key, 1);
    EXPECT_EQ(made.mask.query, 0);
    p.mask = rows.view();
    made = make_problem(p);
    EXPECT_EQ(made.mask.key, 0);
    EXPECT_EQ(made.mask.query, 1);
    p.mask = heads.view();
    made = make_problem(p);
    EXPECT_EQ(made.mask.head, 1);
    EXPECT_EQ(made.mask.query, 0);
    p.mask = full.view();
    made = make_problem(p);
    EXPECT_EQ(made.mask.batch, 140);
    p.mask = scalar.view();
    EXPECT_EQ(make_problem(p).mask.batch, 0);

    Array<std::uint8_t> wrong({5});
    p.mask = wrong.view();
    EXPECT_EQ(value_error(),
              "mask: expected a shape that broadcasts to (B, Hq, Sq, Sk) = (2, 4, 5, 7), got (5,)");
    p.mask.rank = 5;
    EXPECT_EQ(value_error(), "mask: expected at most 4 axes, got 5 with shape (5, 0, 0, 0, ...)");
    p.mask = keys.view(DType::u8);
    EXPECT_EQ(type_error(), "mask: expected bool, got uint8 of shape (7,); use mask.astype(bool)");
    p.mask_as_bool = "a cast";
    Array<std::uint8_t> padding({2, 7}), entries({2, 5, 7});
    p.mask = padding.view(DType::u8);
    EXPECT_EQ(
        type_error(),
        "mask: expected bool, got uint8 of shape (2, 7); use a cast; if its axes are (B, Sk), as those of "
        "padding, pass mask[:, None, None, :], of shape (B, 1, 1, Sk)");
    p.mask = entries.view();
    EXPECT_EQ(
        value_error(),
        "mask: expected a shape that broadcasts to (B, Hq, Sq, Sk) = (2, 4, 5, 7), got (2, 5, 7); if its "
        "axes are (B, Sq, Sk), pass mask[:, None]");
}

TEST_F(Problem, BiasDtypes) {
    Array<float> bias({5, 7});
    p.bias = bias.view();
    EXPECT_NO_THROW(make_problem(p));
    p.bias.dtype = DType::f16;
    EXPECT_EQ(type_error(), "bias: expected float32, got float16");
    for (TensorView* view : {&p.q, &p.k, &p.v, &p.out}) view->dtype = DType::f16;
    EXPECT_NO_THROW(make_problem(p));
    p.bias.dtype = DType::f32;
    EXPECT_NO_THROW(make_problem(p));
    p.bias.dtype = DType::bf16;
    EXPECT_EQ(type_error(), "bias: expected float16 or float32, got bfloat16");
}

TEST_F(Problem, PerHeadArrays) {
    Array<float> slopes({4}), batched({2, 4}), wrong({2});
    p.alibi_slopes = slopes.view();
    EXPECT_EQ(make_problem(p).alibi_slopes.batch, 0);
    p.alibi_slopes = batched.view();
    EXPECT_EQ(make_problem(p).alibi_slopes.batch, 4);
    p.alibi_slopes = wrong.view();
    EXPECT_EQ(value_error(), "alibi_slopes: expected shape (Hq,) = (4,) or (B, Hq) = (2, 4), got (2,)");
    p.alibi_slopes = TensorView{};
    p.sinks = batched.view();
    EXPECT_EQ(value_error(), "sinks: expected shape (Hq,) = (4,), got (2, 4)");
    p.sinks = slopes.view(DType::i32);
    EXPECT_EQ(type_error(), "sinks: expected a float dtype, got int32");
}

TEST_F(Problem, LengthsAreCheckedInEveryIntegerDtype) {
    Array<std::int64_t> lens({2}, std::vector<std::int64_t>{0, 5});
    p.q_lens = p.kv_lens = lens.view();
    EXPECT_EQ(make_problem(p).kv_len(1), 5);
    lens[1] = 6;
    EXPECT_EQ(value_error(), "q_lens: expected lengths from 0 to 5, got 6 at index 1");
    p.q_lens = TensorView{};
    EXPECT_NO_THROW(make_problem(p));
    lens[0] = -1;
    EXPECT_EQ(value_error(), "kv_lens: expected lengths from 0 to 7, got -1 at index 0");
    p.kv_lens.dtype = DType::u64;  // the same bits: 2^64 - 1
    EXPECT_NE(value_error().find("got 9223372036854775807 at index 0"), std::string::npos);
    p.kv_lens = lens.view(DType::boolean);
    EXPECT_EQ(type_error(), "kv_lens: expected an integer dtype, got bool");
    Array<std::int64_t> three({3});
    p.kv_lens = three.view();
    EXPECT_EQ(value_error(), "kv_lens: expected shape (B,) = (2,), got (3,)");

    std::uint16_t small[4] = {3, 999, 4, 999};
    p.kv_lens = make_view(small, DType::u16, {2}, {2});
    EXPECT_EQ(make_problem(p).kv_len(1), 4);
    small[2] = 60000;  // changed after the check: stays within the array
    const AttentionProblem made = [&] {
        small[2] = 4;
        AttentionProblem ok = make_problem(p);
        small[2] = 60000;
        return ok;
    }();
    EXPECT_EQ(made.kv_len(1), 7);
}

TEST_F(Problem, OffsetsOneOrPerEntry) {
    EXPECT_EQ(make_problem(p).offset(0), 2);  // 7 - 5
    Array<std::int64_t> q_lens({2}, std::vector<std::int64_t>{1, 5}),
        kv_lens({2}, std::vector<std::int64_t>{6, 3});
    p.q_lens = q_lens.view();
    p.kv_lens = kv_lens.view();
    EXPECT_EQ(make_problem(p).offset(0), 5);
    EXPECT_EQ(make_problem(p).offset(1), -2);
    p.q_offset = -9;
    EXPECT_EQ(make_problem(p).offset(1), -9);
    Array<std::int32_t> offsets({2}, std::vector<std::int32_t>{-1, 100});
    p.q_offsets = offsets.view();
    EXPECT_EQ(value_error(), "q_offset: expected one value or one per batch entry, got both");
    p.q_offset.reset();
    EXPECT_EQ(make_problem(p).offset(1), 100);
}

TEST_F(Problem, Numbers) {
    const double nan = std::nan(""), inf = INFINITY;
    p.scale = nan;
    EXPECT_EQ(value_error(), "scale: expected a finite number, got nan");
    p.scale = -0.5;
    EXPECT_EQ(make_problem(p).scale, -0.5);
    for (const double bad : {0.0, -1.0, nan, inf}) {
        p.softcap = bad;
        EXPECT_NE(value_error().find("softcap: expected a finite number above 0"), std::string::npos);
    }
    p.softcap.reset();
    for (const double bad : {1.0, -0.1, nan, inf}) {
        p.dropout = bad;
        EXPECT_NE(value_error().find("dropout: expected 0 <= p < 1"), std::string::npos);
    }
    p.dropout = 0.0;
    p.window_left = -1;
    EXPECT_EQ(value_error(), "window: expected a left size >= 0 or None, got -1");
    p.window_left = 0;
    p.window_right = -2;
    EXPECT_EQ(value_error(), "window: expected a right size >= 0 or None, got -2");
    p.window_right.reset();
    p.seed = ~std::uint64_t{0};
    EXPECT_EQ(make_problem(p).seed, ~std::uint64_t{0});
}

TEST_F(Problem, BadViews) {
    p.v.data = nullptr;
    EXPECT_EQ(value_error(), "v: expected data, got a null pointer for shape (2, 7, 2, 6)");
    p.v.data = reinterpret_cast<char*>(call.v.data.data()) + 1;
    EXPECT_EQ(value_error(),
              "v: expected data aligned to float32, got a misaligned pointer for shape (2, 7, 2, 6)");
    p.v = call.v.view();
    p.q.shape[1] = -1;
    EXPECT_EQ(value_error(), "q: expected sizes >= 0, got shape (2, -1, 4, 8)");
    p.q = call.q.view();
    p.q.strides[1] = kHuge / 8;
    EXPECT_NE(value_error().find("q: expected strides within the address space"), std::string::npos);
}

TEST_F(Problem, ByteCountsThatOverflow) {
    p.q.shape[1] = std::int64_t{1} << 60;
    for (auto& stride : p.q.strides) stride = 0;
    EXPECT_EQ(value_error(),
              "q: expected a byte count within 64 bits, got shape (2, 1152921504606846976, 4, 8) of float32");
    // Not with an empty axis either: products of the other sizes must be safe in any order.
    p.q.shape[0] = p.k.shape[0] = p.v.shape[0] = 0;
    EXPECT_NE(value_error().find("q: expected a byte count"), std::string::npos);
    // Large but possible: zero strides past 2^32 rows.
    p = Call(1, 1, 1, 1, 1, 8, 6).params;
    float row[8] = {};
    p.q = make_view(row, DType::f32, {1, std::int64_t{1} << 33, 1, 8}, {0, 0, 0, 1});
    p.k = make_view(row, DType::f32, {1, std::int64_t{1} << 33, 1, 8}, {0, 0, 0, 1});
    p.v = make_view(row, DType::f32, {1, std::int64_t{1} << 33, 1, 1}, {0, 0, 0, 1});
    p.out = TensorView{};
    EXPECT_EQ(make_problem(p, false).q_size, std::int64_t{1} << 33);
}

TEST_F(Problem, StridesOfSingleAndMissingElementsAreMadeHarmless) {
    Call one(1, 1, 1, 1, 1, 1, 1);
    for (auto& stride : one.params.q.strides) stride = kHuge;
    const AttentionProblem made = make_problem(one.params);
    EXPECT_EQ(made.q.batch, 0);
    EXPECT_EQ(made.q.seq, 0);
    EXPECT_EQ(made.q.dim, 1);
    Call empty(2, 5, 0, 4, 2, 8, 6);
    empty.params.k.data = nullptr;
    empty.params.k.strides[0] = kHuge;
    EXPECT_EQ(make_problem(empty.params).k.batch, 0);
}

// ---- outputs ------------------------------------------------------------------------------------
TEST_F(Problem, LseAndWeights) {
    Array<float> lse({2, 4, 5}), weights({2, 4, 5, 7}), wrong({2, 5, 4});
    p.lse = lse.view();
    p.weights = weights.view();
    const AttentionProblem made = make_problem(p);
    EXPECT_EQ(made.lse.head, 5);
    EXPECT_EQ(made.weights.query, 7);
    p.lse = wrong.view();
    EXPECT_EQ(value_error(), "lse: expected shape (B, Hq, Sq) = (2, 4, 5), got (2, 5, 4)");
    p.lse = lse.view(DType::f16);
    EXPECT_EQ(type_error(), "lse: expected float32 to match q, got float16");
    p.lse = lse.view();
    p.weights.rank = 3;
    EXPECT_EQ(value_error(), "weights: expected shape (B, Hq, Sq, Sk) = (2, 4, 5, 7), got (2, 4, 5)");
    // explain() may name outputs that do not exist yet.
    p.weights = weights.view();
    p.weights.data = p.lse.data = p.out.data = nullptr;
    EXPECT_NE(make_problem(p, false).weights.data, nullptr);
}

TEST_F(Problem, OutputsMustBeWritableAndSeparate) {
    p.out.readonly = true;
    EXPECT_EQ(value_error(), "out: expected a writable array, got a read-only one");
    p.out.readonly = false;
    p.out.strides[2] = 0;
    EXPECT_EQ(value_error(),
              "out: expected elements that do not overlap in memory, got strides (120, 24, 0, 1) for shape "
              "(2, 5, 4, 6)");
    p.out.strides[2] = 5;  // the heads' rows of 6 overlap by one
    EXPECT_NE(value_error().find("out: expected elements that do not overlap"), std::string::npos);
    p.q.readonly = p.k.readonly = p.v.readonly = true;
    p.out = call.out.view();
    EXPECT_NO_THROW(make_problem(p));
}

TEST_F(Problem, OutputsMustNotOverlapInputsOrEachOther) {
    Call same(2, 5, 5, 4, 4, 8, 8);
    same.params.out = same.q.view();
    EXPECT_EQ(message_of<ValueError>([&] { make_problem(same.params); }),
              "out: expected memory of its own, but it overlaps q");
    same.params.out = same.out.view();
    same.params.k = same.params.v = same.q.view();  // inputs may alias
    EXPECT_NO_THROW(make_problem(same.params));
    Array<float> scores({2, 4, 5, 6});
    same.params.weights = make_view(scores.data.data(), DType::f32, {2, 4, 5, 5}, {120, 30, 6, 1});
    same.params.lse = make_view(scores.data.data() + 5, DType::f32, {2, 4, 5}, {120, 30, 6});
    EXPECT_NO_THROW(make_problem(same.params));  // a column beside the weights
    same.params.lse.data = scores.data.data() + 4;
    EXPECT_EQ(message_of<ValueError>([&] { make_problem(same.params); }),
              "lse: expected memory of its own, but it overlaps weights");
}

TEST_F(Problem, InterleavedSlicesOfOneBufferAreSeparate) {
    // q, k, v and out in one (B, S, 4, H, D) buffer.
    Array<float> packed({2, 5, 4, 3, 8});
    const auto part = [&](int n) {
        return make_view(packed.data.data() + n * 24, DType::f32, {2, 5, 3, 8}, {480, 96, 8, 1});
    };
    AttentionParams a;
    a.q = part(0);
    a.k = part(1);
    a.v = part(2);
    a.out = part(3);
    EXPECT_NO_THROW(make_problem(a));
    a.out = part(0);
    EXPECT_NE(message_of<ValueError>([&] { make_problem(a); }), "no error");
    a.out = part(3);
    a.out.data = static_cast<float*>(a.out.data) - 1;  // the last of v's elements
    EXPECT_EQ(message_of<ValueError>([&] { make_problem(a); }),
              "out: expected memory of its own, but it overlaps v");

    // x[:, ::2] and x[:, 1::2] of odd length, x[..., ::2] and x[..., 1::2], and a reversed out.
    Array<float> x({2, 5, 3, 8});
    a.q = a.k = a.v = make_view(x.data.data(), DType::f32, {2, 2, 3, 8}, {120, 48, 8, 1});
    a.out = make_view(x.data.data() + 24, DType::f32, {2, 2, 3, 8}, {120, 48, 8, 1});
    EXPECT_NO_THROW(make_problem(a));
    a.q = a.k = a.v = make_view(x.data.data(), DType::f32, {2, 5, 3, 4}, {120, 24, 8, 2});
    a.out = make_view(x.data.data() + 1, DType::f32, {2, 5, 3, 4}, {120, 24, 8, 2});
    EXPECT_NO_THROW(make_problem(a));
    a.out = make_view(x.data.data() + 7 + 120, DType::f32, {2, 5, 3, 4}, {-120, 24, 8, -2});
    EXPECT_NO_THROW(make_problem(a));
    a.out.data = x.data.data() + 6 + 120;
    EXPECT_NE(message_of<ValueError>([&] { make_problem(a); }), "no error");
}

std::set<const char*> bytes_of(const TensorView& view) {
    std::set<const char*> bytes;
    const auto item = static_cast<std::int64_t>(item_size(view.dtype));
    std::int64_t index[4] = {0, 0, 0, 0};
    const auto size = [&](int axis) { return axis < view.rank ? view.shape[axis] : 1; };
    const auto stride = [&](int axis) { return axis < view.rank ? view.strides[axis] : 0; };
    for (index[0] = 0; index[0] < size(0); ++index[0])
        for (index[1] = 0; index[1] < size(1); ++index[1])
            for (index[2] = 0; index[2] < size(2); ++index[2])
                for (index[3] = 0; index[3] < size(3); ++index[3]) {
                    std::int64_t at = 0;
                    for (int axis = 0; axis < 4; ++axis) at += index[axis] * stride(axis);
                    for (std::int64_t n = 0; n < item; ++n)
                        bytes.insert(static_cast<const char*>(view.data) + at * item + n);
                }
    return bytes;
}

TEST(MemoryOverlap, AgreesWithListsOfBytes) {
    std::mt19937 rng(5);
    const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
    alignas(8) static char buffer[4096];
    const DType dtypes[] = {DType::f64, DType::f32, DType::f16, DType::i8};
    const auto random_view = [&] {
        const DType dtype = dtypes[pick(0, 3)];
        const auto item = static_cast<int>(item_size(dtype));
        Shape shape, strides;
        for (int axis = pick(1, 4); axis > 0; --axis) {
            shape.push_back(pick(1, 4));
            strides.push_back(pick(-12, 12));
        }
        return make_view(buffer + 2048 + item * pick(-20, 20), dtype, shape, strides);
    };
    int shared = 0, apart = 0, apart_within_reach = 0;
    for (int n = 0; n < 4000; ++n) {
        const TensorView a = random_view(), b = random_view();
        const std::set<const char*> left = bytes_of(a), right = bytes_of(b);
        const bool expected =
            std::any_of(left.begin(), left.end(), [&](const char* x) { return right.count(x) > 0; });
        ASSERT_EQ(may_share_memory(a, b), expected) << "case " << n;
        const ByteExtent reach = measure(a).extent;
        ASSERT_EQ(reinterpret_cast<std::uintptr_t>(*left.begin()), reach.begin);
        ASSERT_EQ(reinterpret_cast<std::uintptr_t>(*left.rbegin()) + 1, reach.end);
        (expected ? shared : apart) += 1;
        if (!expected && extents_meet(reach, measure(b).extent)) ++apart_within_reach;
        std::int64_t elements = 1;
        for (int axis = 0; axis < a.rank; ++axis) elements *= a.shape[axis];
        const bool overlaps = static_cast<std::int64_t>(left.size()) !=
                              elements * static_cast<std::int64_t>(item_size(a.dtype));
        if (overlaps) {
            ASSERT_TRUE(overlaps_itself(a)) << "case " << n;
        }
    }
    EXPECT_GT(shared, 500);
    EXPECT_GT(apart, 500);
    EXPECT_GT(apart_within_reach, 100);
}

TEST(MemoryOverlap, GivesUpOnTheSafeSide) {
    // Large irregular strides with a common divisor: decided by it, at once.
    alignas(8) static float buffer[8];
    const TensorView even = make_view(buffer, DType::f32, {1 << 20, 1 << 20}, {6, 10});
    const TensorView odd = make_view(buffer + 1, DType::f32, {1 << 20, 1 << 20}, {14, 22});
    EXPECT_FALSE(may_share_memory(even, odd));
    const TensorView other = make_view(buffer + 2, DType::f32, {1 << 20, 1 << 20}, {14, 22});
    EXPECT_TRUE(may_share_memory(even, other));
}

// ---- key_range ------------------------------------------------------------------------------------
TEST(KeyRanges, AreTheKeysThatTheFormulasAllow) {
    for (const int sq : {1, 4}) {
        for (const int sk : {0, 1, 6}) {
            for (const int kv_len : {0, sk}) {
                Call call(1, sq, sk, 1, 1, 2, 2);
                Array<std::int64_t> lens({1}, std::vector<std::int64_t>{kv_len});
                call.params.kv_lens = lens.view();
                for (int option = 0; option < 2 * 4 * 4 * 13; ++option) {
                    AttentionParams p = call.params;
                    p.causal = option % 2 != 0;
                    const int left = option / 2 % 4 - 1, right = option / 8 % 4 - 1, offset = option / 32 - 6;
                    if (left >= 0) p.window_left = left;
                    if (right >= 0) p.window_right = right;
                    p.q_offset = offset;
                    const AttentionProblem made = make_problem(p);
                    double pairs = 0;
                    for (int i = 0; i < sq; ++i) {
                        const KeyRange range = made.key_range(0, i);
                        ASSERT_LE(0, range.begin);
                        ASSERT_LE(range.begin, range.end);
                        ASSERT_LE(range.end, kv_len);
                        const int position = i + offset;
                        for (int j = 0; j < sk; ++j) {
                            const bool allowed = j < kv_len && (!p.causal || j <= position) &&
                                                 (left < 0 || position - left <= j) &&
                                                 (right < 0 || j <= position + right);
                            ASSERT_EQ(allowed, range.begin <= j && j < range.end)
                                << "i=" << i << " j=" << j << " option=" << option;
                            pairs += allowed ? 1 : 0;
                        }
                    }
                    ASSERT_EQ(count_flops(made), pairs * 2 * (2 + 2)) << "option=" << option;
                }
            }
        }
    }
}

TEST(KeyRanges, SaturateAtTheEndsOfTheIntegers) {
    Call call(1, 4, 6, 1, 1, 2, 2);
    AttentionParams p = call.params;
    const auto range_of = [&](std::int64_t i) { return make_problem(p).key_range(0, i); };
    p.causal = true;
    p.q_offset = kHuge;
    EXPECT_EQ(range_of(3).end, 6);
    p.q_offset = std::numeric_limits<std::int64_t>::min();
    EXPECT_EQ(range_of(3).end, 0);
    p.window_left = p.window_right = kHuge;
    EXPECT_EQ(range_of(3).end, 0);
    p.causal = false;
    p.q_offset = kHuge;
    EXPECT_EQ(range_of(3).begin, 3);  // exactly p - left
    EXPECT_EQ(range_of(3).end, 6);
    p.window_left = 0;
    EXPECT_EQ(range_of(3).begin, 6);
    EXPECT_EQ(range_of(3).end, 6);
}

TEST(Flops, CountRowsUpToTheirLengthsInEveryEntry) {
    Call call(3, 40, 50, 4, 2, 8, 6);
    Array<std::int64_t> q_lens({3}, std::vector<std::int64_t>{40, 0, 17}),
        kv_lens({3}, std::vector<std::int64_t>{50, 9, 33});
    call.params.q_lens = q_lens.view();
    call.params.kv_lens = kv_lens.view();
    call.params.causal = true;
    call.params.window_left = 11;
    const AttentionProblem made = make_problem(call.params);
    double pairs = 0;
    for (std::int64_t b = 0; b < 3; ++b)
        for (std::int64_t i = 0; i < made.q_len(b); ++i) {
            const KeyRange range = made.key_range(b, i);
            pairs += static_cast<double>(range.end - range.begin);
        }
    EXPECT_EQ(count_flops(made), pairs * 4 * 2 * (8 + 6));
}

TEST(Errors, OutOfMemoryNamesTheBytes) {
    const OutOfMemory error("the workspace", 12345);
    EXPECT_STREQ(error.what(), "fastattn: no memory for the workspace: 12345 bytes asked for");
    EXPECT_EQ(error.bytes, 12345u);
}

}  // namespace
}  // namespace fastattn::testing
