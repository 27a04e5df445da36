// attention_backward: what make_backward_problem refuses, gradients by hand and by differences, and every kernel of this
// machine against cpu-reference.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include <fastattn/attention.h>

#include "arrays.h"
#include "core/half.h"

namespace fastattn::testing {
namespace {

// T: the compute type; arrays of f16 and bf16 are made of it by rounding.
std::vector<std::uint16_t> to_bits(const std::vector<double>& values, DType dtype) {
    std::vector<std::uint16_t> bits;
    for (const double x : values) bits.push_back(dtype == DType::f16 ? f64_to_f16(x) : f64_to_bf16(x));
    return bits;
}

// One array in any float dtype.
struct AnyArray {
    Shape shape;
    DType dtype;
    std::vector<double> f64;
    std::vector<float> f32;
    std::vector<std::uint16_t> bits;

    AnyArray(DType type, Shape sizes, unsigned seed, bool random = true)
        : shape(std::move(sizes)), dtype(type) {
        std::vector<double> values =
            random ? random_array<double>(shape, seed).data : Array<double>(shape, -7.0).data;
        if (dtype == DType::f64) f64 = values;
        if (dtype == DType::f32) f32.assign(values.begin(), values.end());
        if (item_size(dtype) == 2) bits = to_bits(values, dtype);
    }
    void fill(double value) {
        f64.assign(f64.size(), value);
        f32.assign(f32.size(), static_cast<float>(value));
    }
    void* data() {
        if (dtype == DType::f64) return f64.data();
        return dtype == DType::f32 ? static_cast<void*>(f32.data()) : bits.data();
    }
    TensorView view() { return make_view(data(), dtype, shape, contiguous_strides(shape)); }
    std::size_t size() const { return f64.size() + f32.size() + bits.size(); }
    double operator[](std::size_t i) const {
        if (dtype == DType::f64) return f64[i];
        if (dtype == DType::f32) return double(f32[i]);
        return double(dtype == DType::f16 ? f16_to_f32(bits[i]) : bf16_to_f32(bits[i]));
    }
};

struct Sizes {
    std::int64_t B = 2, Sq = 50, Sk = 70, Hq = 4, Hkv = 2, D = 24, Dv = 40;
};

// A forward and a backward call with all that they may need; features set what is used.
struct Training {
    DType dtype, lse_dtype;
    Sizes n;
    AnyArray q, k, v, out, dout, dq, dk, dv, lse, dlse;
    AnyArray bias, dbias, slopes, dslopes, sinks, dsinks;
    Array<std::uint8_t> mask;
    Array<std::int32_t> q_lens, kv_lens;
    AttentionParams params;
    BackwardParams backward;

    explicit Training(DType type, Sizes s = {})
        : dtype(type),
          lse_dtype(type == DType::f64 ? DType::f64 : DType::f32),
          n(s),
          q(type, {s.B, s.Sq, s.Hq, s.D}, 1),
          k(type, {s.B, s.Sk, s.Hkv, s.D}, 2),
          v(type, {s.B, s.Sk, s.Hkv, s.Dv}, 3),
          out(type, {s.B, s.Sq, s.Hq, s.Dv}, 0, false),
          dout(type, out.shape, 4),
          dq(type, q.shape, 0, false),
          dk(type, k.shape, 0, false),
          dv(type, v.shape, 0, false),
          lse(lse_dtype, {s.B, s.Hq, s.Sq}, 0, false),
          dlse(lse_dtype, lse.shape, 5),
          bias(lse_dtype, {1, s.Hq, 1, s.Sk}, 6),
          dbias(lse_dtype, bias.shape, 0, false),
          slopes(lse_dtype, {s.Hq}, 7),
          dslopes(lse_dtype, {s.Hq}, 0, false),
          sinks(lse_dtype, {s.Hq}, 8),
          dsinks(lse_dtype, {s.Hq}, 0, false),
          mask({s.B, 1, s.Sq, s.Sk}),
          q_lens({s.B}, static_cast<std::int32_t>(s.Sq - s.Sq / 10)),
          kv_lens({s.B}, static_cast<std::int32_t>(s.Sk - s.Sk / 10)) {
        std::mt19937 rng(9);
        for (auto& x : mask.data) x = rng() % 3 != 0;
        params.q = q.view(), params.k = k.view(), params.v = v.view();
        params.out = out.view(), params.lse = lse.view();
        backward.dout = dout.view(), backward.dlse = dlse.view();
        backward.dq = dq.view(), backward.dk = dk.view(), backward.dv = dv.view();
    }
    Training(const Training&) = delete;
    Training& operator=(const Training&) = delete;

    void add_bias() { params.bias = bias.view(), backward.dbias = dbias.view(); }
    // Small ones: a score of s is known to eps * s.
    void add_slopes() {
        slopes.fill(0.02);
        params.alibi_slopes = slopes.view(), backward.dalibi_slopes = dslopes.view();
    }
    void add_sinks() { params.sinks = sinks.view(), backward.dsinks = dsinks.view(); }

    BackwardProblem problem() {
        backward.forward = params;
        return make_backward_problem(backward);
    }
    void run(const char* kernel, int threads = 0) {
        RunOptions options;
        options.kernel = kernel;
        options.num_threads = threads;
        attention_forward(make_problem(params), options);
        attention_backward(problem(), options);
    }
    std::string problem_error() {
        return message_of<ValueError>([&] { problem(); });
    }
    std::vector<const AnyArray*> gradients() const { return {&dq, &dk, &dv, &dbias, &dslopes, &dsinks}; }
};

// ---- what is refused --------------------------------------------------------------------------------
TEST(BackwardProblem, GradientsHaveTheShapesOfTheirArguments) {
    Training t(DType::f32);
    t.backward.dk = t.dq.view();
    EXPECT_EQ(t.problem_error(),
              "dk: expected shape (2, 70, 2, 24) to match k (2, 70, 2, 24), got (2, 50, 4, 24)");
    t.backward.dk = t.dk.view();
    t.backward.dout = t.q.view();
    EXPECT_EQ(t.problem_error(),
              "dout: expected shape (2, 50, 4, 40) to match q (2, 50, 4, 24), got (2, 50, 4, 24)");
    t.backward.dout = t.dout.view();
    t.add_bias();
    t.backward.dbias = t.dslopes.view();
    EXPECT_EQ(t.problem_error(), "dbias: expected shape (1, 4, 1, 70) as bias, got (4,)");
    t.params.bias = {};
    EXPECT_EQ(t.problem_error(), "dbias: expected none without bias");
}

TEST(BackwardProblem, WhatTheForwardWroteIsNeeded) {
    Training t(DType::f32);
    t.params.lse = {};
    EXPECT_EQ(t.problem_error(), "lse: expected an array, got none");
    t.params.lse = t.lse.view();
    t.params.out = {};
    EXPECT_EQ(t.problem_error(), "out: expected an array, got none");
    t.params.out = t.out.view();
    t.backward.dq = {};
    EXPECT_EQ(t.problem_error(), "dq: expected an array, got none");
}

TEST(BackwardProblem, GradientsHaveTheirOwnMemory) {
    Training t(DType::f32);
    t.backward.dq = t.q.view();
    EXPECT_EQ(t.problem_error(), "dq: expected memory of its own, but it overlaps q");
    t.backward.dq = t.dq.view();
    t.backward.dq.readonly = true;
    EXPECT_EQ(t.problem_error(), "dq: expected a writable array, got a read-only one");
}

TEST(BackwardProblem, DtypesAreThoseOfTheForward) {
    Training t(DType::f32);
    AnyArray other(DType::f64, t.dlse.shape, 1);
    t.backward.dlse = other.view();
    EXPECT_EQ(message_of<TypeError>([&] { t.problem(); }), "dlse: expected float32 to match q, got float64");
}

// ---- by hand and by differences ------------------------------------------------------------------------
// One query of D = 1, k = (0, log 2, log 5), v = (8, 16, 24): weights 1/8, 2/8, 5/8, out 20.
TEST(BackwardByHand, Softmax) {
    Array<double> q({1, 1}, 1.0), k({3, 1}, std::vector<double>{0.0, std::log(2.0), std::log(5.0)});
    Array<double> v({3, 1}, std::vector<double>{8.0, 16.0, 24.0}), out({1, 1}), lse({1}), dout({1, 1}, 1.0);
    Array<double> dq({1, 1}), dk({3, 1}), dv({3, 1});
    BackwardParams b;
    b.forward.q = q.view(), b.forward.k = k.view(), b.forward.v = v.view(), b.forward.out = out.view();
    b.forward.lse = lse.view(), b.forward.scale = 1.0;
    b.dout = dout.view(), b.dq = dq.view(), b.dk = dk.view(), b.dv = dv.view();
    RunOptions options;
    options.kernel = "cpu-reference";
    attention_forward(make_problem(b.forward), options);
    attention_backward(make_backward_problem(b), options);
    EXPECT_NEAR(dv[0], 0.125, 1e-15);
    EXPECT_NEAR(dv[2], 0.625, 1e-15);
    // dS_j = P_j (v_j - out)
    EXPECT_NEAR(dk[0], 0.125 * (8 - 20), 1e-13);
    EXPECT_NEAR(dk[1], 0.25 * (16 - 20), 1e-13);
    EXPECT_NEAR(dk[2], 0.625 * (24 - 20), 1e-13);
    EXPECT_NEAR(dq[0], -1.0 * std::log(2.0) + 2.5 * std::log(5.0), 1e-13);
}

// loss = sum(dout * out) + sum(dlse * lse), along the direction of one element.
TEST(BackwardByDifferences, OneElementOfEach) {
    Training t(DType::f64, {1, 6, 7, 2, 1, 3, 5});
    t.add_bias(), t.add_slopes(), t.add_sinks();
    t.params.causal = true, t.params.softcap = 1.5, t.params.dropout = 0.2, t.params.seed = 3;
    t.run("cpu-reference");
    const auto loss = [&] {
        RunOptions options;
        options.kernel = "cpu-reference";
        attention_forward(make_problem(t.params), options);
        double sum = 0;
        for (std::size_t i = 0; i < t.out.size(); ++i) sum += t.out[i] * t.dout[i];
        for (std::size_t i = 0; i < t.lse.size(); ++i) sum += t.lse[i] * t.dlse[i];
        return sum;
    };
    const auto expect = [&](AnyArray& x, const AnyArray& gradient, std::size_t i) {
        constexpr double h = 1e-5;
        const double at = x.f64[i];
        x.f64[i] = at + h;
        const double above = loss();
        x.f64[i] = at - h;
        const double below = loss();
        x.f64[i] = at;
        EXPECT_NEAR(gradient[i], (above - below) / (2 * h), 1e-8);
    };
    expect(t.q, t.dq, 5), expect(t.k, t.dk, 4), expect(t.v, t.dv, 7);
    expect(t.bias, t.dbias, 3), expect(t.slopes, t.dslopes, 1), expect(t.sinks, t.dsinks, 0);
}

// ---- every kernel against the reference ------------------------------------------------------------------
struct Feature {
    const char* name;
    std::function<void(Training&)> set;
};
const std::vector<Feature> kFeatures = {
    {"plain", [](Training&) {}},
    {"causal", [](Training& t) { t.params.causal = true; }},
    {"window", [](Training& t) { t.params.window_left = 9, t.params.window_right = 4; }},
    {"mask", [](Training& t) { t.params.mask = t.mask.view(); }},
    {"bias", [](Training& t) { t.add_bias(); }},
    {"alibi", [](Training& t) { t.add_slopes(); }},
    {"softcap", [](Training& t) { t.params.softcap = 2.0; }},
    {"sinks", [](Training& t) { t.add_sinks(); }},
    {"lengths", [](Training& t) { t.params.q_lens = t.q_lens.view(), t.params.kv_lens = t.kv_lens.view(); }},
    {"dropout", [](Training& t) { t.params.dropout = 0.3, t.params.seed = 11; }},
    {"all",
     [](Training& t) {
         t.params.causal = true, t.params.softcap = 2.0, t.params.dropout = 0.1,
         t.params.mask = t.mask.view();
         t.params.kv_lens = t.kv_lens.view();
         t.add_bias(), t.add_slopes(), t.add_sinks();
     }},
};

// Relative to the largest element: the rounding of P and dS, and of the result.
double tolerance(DType dtype) {
    switch (dtype) {
        case DType::f64: return 1e-13;
        case DType::f32: return 5e-6;
        case DType::f16: return 4e-3;
        default: return 3e-2;
    }
}

void expect_close(const Training& got, const Training& want, const std::string& where) {
    for (std::size_t g = 0; g < want.gradients().size(); ++g) {
        const AnyArray &x = *got.gradients()[g], &y = *want.gradients()[g];
        // A slope's gradient sums dS times distances, up to Sk.
        double top = g == 4 ? double(want.n.Sk) : 1.0, error = 0.0;
        for (std::size_t i = 0; i < y.size(); ++i) {
            top = std::max(top, std::abs(y[i]));
            error = std::max(error, std::abs(x[i] - y[i]));
        }
        EXPECT_LE(error, tolerance(want.dtype) * top) << where << ", gradient " << g;
    }
}

TEST(BackwardKernels, AgreeWithTheReference) {
    const Sizes sizes[] = {{}, {1, 7, 400, 2, 2, 64, 64}, {1, 200, 9, 6, 2, 5, 130}, {3, 1, 65, 1, 1, 1, 1}};
    for (const KernelInfo& kernel : kernels()) {
        if (!kernel.usable || kernel.device != "cpu" || kernel.name == "cpu-reference") continue;
        for (const DType dtype : kernel.dtypes) {
            for (const Sizes& n : sizes) {
                for (const Feature& feature : kFeatures) {
                    Training got(dtype, n), want(dtype, n);
                    feature.set(got), feature.set(want);
                    got.run(kernel.name.c_str());
                    want.run("cpu-reference");
                    expect_close(got, want,
                                 kernel.name + " " + dtype_name(dtype) + " " + feature.name +
                                     " Sq=" + std::to_string(n.Sq) + " Sk=" + std::to_string(n.Sk));
                }
            }
        }
    }
}

// More keys than one block, so that dq is summed chunk by chunk, as one item or as several.
TEST(BackwardKernels, HaveTheSameBitsForAnyNumberOfThreads) {
    for (const KernelInfo& kernel : kernels()) {
        if (!kernel.usable || kernel.device != "cpu") continue;
        const Sizes n{1, 40, 900, 2, 1, 8, 8};
        Training one(kernel.dtypes[0], n), many(kernel.dtypes[0], n);
        for (Training* t : {&one, &many}) {
            t->params.causal = true;
            t->add_bias(), t->add_slopes(), t->add_sinks();
        }
        one.run(kernel.name.c_str(), 1);
        many.run(kernel.name.c_str(), 5);
        for (std::size_t g = 0; g < one.gradients().size(); ++g) {
            const AnyArray &x = *one.gradients()[g], &y = *many.gradients()[g];
            for (std::size_t i = 0; i < x.size(); ++i)
                ASSERT_EQ(x[i], y[i]) << kernel.name << " gradient " << g;
        }
    }
}

}  // namespace
}  // namespace fastattn::testing
