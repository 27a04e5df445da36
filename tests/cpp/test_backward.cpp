// attention_backward: what make_backward_problem refuses, gradients by hand and by differences, and every
// kernel of this machine against cpu-reference.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include <fastattn/attention.h>

#include "training.h"

namespace fastattn::testing {
namespace {

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
TEST(BackwardKernels, AgreeWithTheReference) {
    // Two blocks of keys, and more than one in a chunk, among them.
    const Sizes sizes[] = {{},
                           {1, 7, 700, 2, 2, 64, 64},
                           {1, 5, 4700, 1, 1, 8, 8},
                           {1, 200, 9, 6, 2, 5, 130},
                           {3, 1, 65, 1, 1, 1, 1}};
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

// More keys than one block, so that dq is summed chunk by chunk: as one item with one thread, as several with
// five.
TEST(BackwardKernels, HaveTheSameBitsForAnyNumberOfThreads) {
    for (const KernelInfo& kernel : kernels()) {
        if (!kernel.usable || kernel.device != "cpu") continue;
        const Sizes n{1, 40, 900, 8, 4, 8, 8};
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
