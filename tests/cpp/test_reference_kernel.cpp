#include "reference/forward.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>

#include "arrays.h"
#include "core/half.h"
#include "core/philox.h"

namespace fastattn::testing {
namespace {

const double kInf = std::numeric_limits<double>::infinity();
const double kNaN = std::nan("");

void run_reference(const AttentionParams& params) {
    RunOptions options;
    options.kernel = "cpu-reference";
    attention_forward(make_problem(params), options);
}

// ---- by hand --------------------------------------------------------------------------------------
// One query of D = 1 against three keys: with q = 1 and scale 1 the scores are the keys themselves.
struct ByHand {
    Array<double> q{{1, 1}, 1.0};
    Array<double> k{{3, 1}, std::vector<double>{0.0, std::log(2.0), std::log(5.0)}};
    Array<double> v{{3, 1}, std::vector<double>{8.0, 16.0, 24.0}};
    Array<double> out{{1, 1}, -7.0}, lse{{1}, -7.0}, weights{{1, 3}, -7.0};
    AttentionParams params;

    ByHand() {
        params.q = q.view();
        params.k = k.view();
        params.v = v.view();
        params.out = out.view();
        params.lse = lse.view();
        params.weights = weights.view();
        params.scale = 1.0;
    }
    void expect(double expected_out, double sum, std::vector<double> expected_weights) {
        run_reference(params);
        EXPECT_NEAR(out[0], expected_out, 1e-13);
        EXPECT_NEAR(lse[0], std::log(sum), 1e-14);
        for (std::size_t j = 0; j < 3; ++j) EXPECT_NEAR(weights[j], expected_weights[j], 1e-15) << j;
    }
};

TEST(ReferenceByHand, Softmax) { ByHand().expect((8.0 + 32 + 120) / 8, 8, {1.0 / 8, 2.0 / 8, 5.0 / 8}); }

TEST(ReferenceByHand, SinkTakesWeight) {
    ByHand c;
    Array<double> sink({1}, std::log(2.0));
    c.params.sinks = sink.view();
    c.expect(16, 10, {0.1, 0.2, 0.5});
}

TEST(ReferenceByHand, MaskKeepsNaNOut) {
    ByHand c;
    Array<std::uint8_t> mask({3}, std::vector<std::uint8_t>{1, 0, 1});
    c.params.mask = mask.view();
    c.k[1] = c.v[1] = kNaN;
    c.expect((8.0 + 120) / 6, 6, {1.0 / 6, 0, 5.0 / 6});
}

TEST(ReferenceByHand, BiasAddsAndMinusInfinityMasks) {
    ByHand c;
    Array<double> bias({3}, std::vector<double>{std::log(3.0), -kInf, 0.0});
    c.params.bias = bias.view();
    c.k[1] = c.v[1] = kNaN;
    c.expect((24.0 + 120) / 8, 8, {3.0 / 8, 0, 5.0 / 8});
}

TEST(ReferenceByHand, AlibiFallsWithTheDistance) {
    ByHand c;  // the query stands at 2, so the distances are 2, 1, 0
    Array<double> slope({1}, std::log(2.0));
    c.params.alibi_slopes = slope.view();
    c.expect((8 * 0.25 + 16 * 1 + 24 * 5) / 6.25, 6.25, {0.25 / 6.25, 1 / 6.25, 5 / 6.25});
}

TEST(ReferenceByHand, WindowAndOffset) {
    ByHand c;
    c.params.q_offset = 1;
    c.params.causal = true;
    c.expect(40.0 / 3, 3, {1.0 / 3, 2.0 / 3, 0});
    c.params.causal = false;
    c.params.window_left = 0;
    c.expect((32.0 + 120) / 7, 7, {0, 2.0 / 7, 5.0 / 7});
}

TEST(ReferenceByHand, SoftcapBendsScores) {
    ByHand c;
    c.params.softcap = 0.5;
    const double a = std::exp(0.5 * std::tanh(2 * std::log(2.0))),
                 b = std::exp(0.5 * std::tanh(2 * std::log(5.0)));
    const double sum = 1 + a + b;
    c.expect((8 + 16 * a + 24 * b) / sum, sum, {1 / sum, a / sum, b / sum});
}

TEST(ReferenceByHand, NothingToAttend) {
    ByHand c;
    Array<std::int64_t> none({1}, 0);
    c.params.kv_lens = none.view();
    run_reference(c.params);
    EXPECT_EQ(c.out[0], 0);
    EXPECT_EQ(c.lse[0], -kInf);
    for (std::size_t j = 0; j < 3; ++j) EXPECT_EQ(c.weights[j], 0);
    Array<double> sink({1}, 3.5);
    c.params.sinks = sink.view();
    run_reference(c.params);
    EXPECT_EQ(c.out[0], 0);
    EXPECT_EQ(c.lse[0], 3.5);
    c.params.kv_lens = TensorView{};
    c.params.q_lens = none.view();  // a row that does not exist: the sink does not count
    run_reference(c.params);
    EXPECT_EQ(c.out[0], 0);
    EXPECT_EQ(c.lse[0], -kInf);
}

TEST(ReferenceByHand, InfinitiesAndNaN) {
    struct Case {
        double key, sink, out, lse;
    };
    // All keys the same; -inf as "no sink" adds nothing.
    for (const Case& expected : {Case{-kInf, -kInf, kNaN, -kInf}, Case{-kInf, 2.0, 0.0, 2.0},
                                 Case{0.0, kInf, 0.0, kInf}, Case{0.0, kNaN, kNaN, kNaN}}) {
        ByHand c;
        Array<double> sink({1}, expected.sink);
        c.params.sinks = sink.view();
        for (double& key : c.k.data) key = expected.key;
        run_reference(c.params);
        const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
        EXPECT_TRUE(same(c.out[0], expected.out)) << c.out[0] << " for sink " << expected.sink;
        EXPECT_TRUE(same(c.lse[0], expected.lse)) << c.lse[0] << " for sink " << expected.sink;
    }
    for (const double bad : {kInf, kNaN}) {
        ByHand c;
        c.k[1] = bad;
        run_reference(c.params);
        EXPECT_TRUE(std::isnan(c.out[0]));
        EXPECT_FALSE(std::isfinite(c.lse[0]));
        ByHand w;
        w.v[1] = bad;
        run_reference(w.params);
        EXPECT_FALSE(std::isfinite(w.out[0]));
        EXPECT_NEAR(w.lse[0], std::log(8.0), 1e-14);
    }
}

// ---- against the formulas -------------------------------------------------------------------------
// Everything on at once, from doubles; the scores are held in full, the softmax is not shifted.
struct Expected {
    std::vector<double> out, lse, weights;
};

Expected formulas(const AttentionProblem& p, const std::vector<double>& q, const std::vector<double>& k,
                  const std::vector<double>& v, const std::vector<bool>& mask,
                  const std::vector<double>& bias, const std::vector<double>& slopes,
                  const std::vector<double>& sinks) {
    Expected e;
    const auto at = [](const std::vector<double>& x, std::int64_t n) {
        return x[static_cast<std::size_t>(n)];
    };
    for (std::int64_t b = 0; b < p.batch; ++b)
        for (std::int64_t i = 0; i < p.q_size; ++i)
            for (std::int64_t h = 0; h < p.q_heads; ++h) {
                const std::int64_t g = h / p.group, row = (b * p.q_heads + h) * p.q_size + i;
                const bool exists = i < p.q_len(b);
                std::vector<double> weight(static_cast<std::size_t>(p.kv_size), 0.0);
                double sum = exists ? std::exp(at(sinks, h)) : 0.0;
                const std::int64_t position = i + p.offset(b);
                for (std::int64_t j = 0; j < p.kv_size; ++j) {
                    const std::int64_t pair = row * p.kv_size + j;
                    if (!exists || j >= p.kv_len(b) || j > position || j < position - p.window_left ||
                        !mask[static_cast<std::size_t>(pair)])
                        continue;
                    double dot = 0;
                    for (std::int64_t d = 0; d < p.head_dim; ++d)
                        dot += at(q, ((b * p.q_size + i) * p.q_heads + h) * p.head_dim + d) *
                               at(k, ((b * p.kv_size + j) * p.kv_heads + g) * p.head_dim + d);
                    const double s = p.softcap * std::tanh(dot * p.scale / p.softcap) -
                                     at(slopes, h) * static_cast<double>(std::abs(position - j)) +
                                     at(bias, pair);
                    sum += weight[static_cast<std::size_t>(j)] = std::exp(s);
                }
                e.lse.push_back(std::log(sum));
                for (double& w : weight) {
                    w = sum > 0 ? w / sum : 0;
                    e.weights.push_back(w);
                }
                for (std::int64_t d = 0; d < p.value_dim; ++d) {
                    double o = 0;
                    for (std::int64_t j = 0; j < p.kv_size; ++j) {
                        const auto block =
                            philox4x32(static_cast<std::uint32_t>(j / 4), static_cast<std::uint32_t>(i),
                                       static_cast<std::uint32_t>(h), static_cast<std::uint32_t>(b), p.seed);
                        if (block.word[j % 4] < p.dropout * 4294967296.0) continue;
                        o += weight[static_cast<std::size_t>(j)] / (1 - p.dropout) *
                             at(v, ((b * p.kv_size + j) * p.kv_heads + g) * p.value_dim + d);
                    }
                    e.out.push_back(o);
                }
            }
    return e;  // out (B,Sq,Hq,Dv); lse and weights (B,Sq,Hq[,Sk])
}

template <class T>
struct Type;
template <>
struct Type<double> {
    static constexpr DType dtype = DType::f64;
    static double read(double x) { return x; }
    static double write(double x) { return x; }
    static constexpr double tolerance = 1e-13;
};
template <>
struct Type<float> {
    static constexpr DType dtype = DType::f32;
    static double read(float x) { return static_cast<double>(x); }
    static float write(double x) { return static_cast<float>(x); }
    static constexpr double tolerance = 3e-7;
};
struct F16 {
    std::uint16_t bits;
};
template <>
struct Type<F16> {
    static constexpr DType dtype = DType::f16;
    static double read(F16 x) { return static_cast<double>(f16_to_f32(x.bits)); }
    static F16 write(double x) { return {f64_to_f16(x)}; }
    static constexpr double tolerance = 2e-3;
};
struct BF16 {
    std::uint16_t bits;
};
template <>
struct Type<BF16> {
    static constexpr DType dtype = DType::bf16;
    static double read(BF16 x) { return static_cast<double>(bf16_to_f32(x.bits)); }
    static BF16 write(double x) { return {f64_to_bf16(x)}; }
    static constexpr double tolerance = 1.6e-2;
};

template <class T>
class Reference : public ::testing::Test {};
using Types = ::testing::Types<double, float, F16, BF16>;
TYPED_TEST_SUITE(Reference, Types);

TYPED_TEST(Reference, EveryFeatureAtOnceWithReversedAndSpreadStrides) {
    using T = TypeParam;
    const std::int64_t B = 2, Sq = 19, Sk = 23, Hq = 4, Hkv = 2, D = 5, Dv = 3;
    // Values as the dtype holds them, in a buffer with gaps, walked backwards over the sequence.
    const auto fill = [](std::vector<T>& buffer, std::vector<double>& values, std::int64_t b, std::int64_t s,
                         std::int64_t h, std::int64_t d, unsigned seed) {
        std::mt19937 rng(seed);
        std::normal_distribution<double> normal;
        buffer.assign(static_cast<std::size_t>(b * s * h * d * 2), Type<T>::write(1e4));
        TensorView view =
            make_view(buffer.data(), Type<T>::dtype, {b, s, h, d}, {s * h * d * 2, -h * d * 2, d * 2, 2});
        T* const base = buffer.data() + (s - 1) * h * d * 2;
        for (std::int64_t n = 0; n < b * s * h * d; ++n) {
            const T x = Type<T>::write(normal(rng));
            values.push_back(Type<T>::read(x));
            base[n / (s * h * d) * view.strides[0] + n / (h * d) % s * view.strides[1] +
                 n / d % h * view.strides[2] + n % d * 2] = x;
        }
        view.data = base;
        return view;
    };
    std::vector<T> q_buffer, k_buffer, v_buffer, out(static_cast<std::size_t>(B * Sq * Hq * Dv));
    std::vector<double> q, k, v;
    AttentionParams params;
    params.q = fill(q_buffer, q, B, Sq, Hq, D, 1);
    params.k = fill(k_buffer, k, B, Sk, Hkv, D, 2);
    params.v = fill(v_buffer, v, B, Sk, Hkv, Dv, 3);
    params.out = make_view(out.data(), Type<T>::dtype, {B, Sq, Hq, Dv}, contiguous_strides({B, Sq, Hq, Dv}));
    // lse and weights as (B,Hq,Sq[,Sk]) views of memory in the order that formulas() writes.
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    std::vector<Wide> lse(static_cast<std::size_t>(B * Sq * Hq)),
        weights(static_cast<std::size_t>(B * Sq * Hq * Sk));
    params.lse = make_view(lse.data(), dtype_of<Wide>(), {B, Hq, Sq}, {Sq * Hq, 1, Hq});
    params.weights =
        make_view(weights.data(), dtype_of<Wide>(), {B, Hq, Sq, Sk}, {Sq * Hq * Sk, Sk, Hq * Sk, 1});

    // The mask over keys and heads, the bias over rows and keys: both broadcast.
    Array<std::uint8_t> mask({Hq, 1, Sk});
    Array<Wide> bias = random_array<Wide>({Sq, Sk}, 4), slopes = random_array<Wide>({Hq}, 5),
                sinks = random_array<Wide>({Hq}, 6);
    for (std::size_t n = 0; n < mask.data.size(); ++n) mask[n] = n % 3 != 0;
    std::vector<bool> full_mask;
    std::vector<double> full_bias;
    for (std::int64_t n = 0; n < B * Hq * Sq * Sk; ++n) {
        full_mask.push_back(mask[static_cast<std::size_t>(n / (Sq * Sk) % Hq * Sk + n % Sk)] != 0);
        full_bias.push_back(static_cast<double>(bias[static_cast<std::size_t>(n % (Sq * Sk))]));
    }
    params.mask = mask.view();
    params.bias = bias.view();
    params.alibi_slopes = slopes.view();
    params.sinks = sinks.view();
    Array<std::int32_t> q_lens({B}, std::vector<std::int32_t>{19, 11}),
        kv_lens({B}, std::vector<std::int32_t>{15, 23});
    params.q_lens = q_lens.view();
    params.kv_lens = kv_lens.view();
    params.causal = true;
    params.window_left = 9;
    params.softcap = 1.5;
    params.scale = -0.7;
    params.dropout = 0.25;
    params.seed = 0x123456789ABCDEFull;

    const AttentionProblem problem = make_problem(params);
    const Expected expected =
        formulas(problem, q, k, v, full_mask, full_bias, {slopes.data.begin(), slopes.data.end()},
                 {sinks.data.begin(), sinks.data.end()});
    run_reference(params);
    double largest = 0;
    for (std::size_t n = 0; n < out.size(); ++n) {
        ASSERT_NEAR(Type<T>::read(out[n]), expected.out[n],
                    Type<T>::tolerance * (1 + std::abs(expected.out[n])))
            << n;
        largest = std::max(largest, std::abs(expected.out[n]));
    }
    EXPECT_GT(largest, 0.5);
    const double wide = std::is_same_v<T, double> ? 1e-13 : 1e-6;
    for (std::size_t n = 0; n < lse.size(); ++n) {
        if (std::isinf(expected.lse[n])) {
            ASSERT_EQ(static_cast<double>(lse[n]), expected.lse[n]);
        } else {
            ASSERT_NEAR(static_cast<double>(lse[n]), expected.lse[n], wide * (1 + std::abs(expected.lse[n])))
                << n;
        }
    }
    for (std::size_t n = 0; n < weights.size(); ++n)
        ASSERT_NEAR(static_cast<double>(weights[n]), expected.weights[n], wide) << n;
}

TEST(ReferenceKernel, EmptySizes) {
    for (const auto& [b, sq, h] : {std::tuple{0, 3, 2}, {2, 0, 2}, {2, 3, 0}}) {
        Call call(b, sq, 4, h, h, 2, 2);
        EXPECT_NO_THROW(run_reference(call.params));
    }
    Call no_keys(2, 3, 0, 2, 2, 2, 2);
    run_reference(no_keys.params);
    for (const float x : no_keys.out.data) EXPECT_EQ(x, 0.0f);
}

}  // namespace
}  // namespace fastattn::testing
