// A forward and a backward call with all that they may need, and gradients against those of cpu-reference.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "arrays.h"
#include "core/half.h"

namespace fastattn::testing {

// T: the compute type; arrays of f16 and bf16 are made of it by rounding.
inline std::vector<std::uint16_t> to_bits(const std::vector<double>& values, DType dtype) {
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

struct Feature {
    const char* name;
    std::function<void(Training&)> set;
};
inline const std::vector<Feature> kFeatures = {
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
inline double tolerance(DType dtype) {
    switch (dtype) {
        case DType::f64: return 1e-13;
        case DType::f32: return 5e-6;
        case DType::f16: return 4e-3;
        default: return 3e-2;
    }
}

inline void expect_close(const Training& got, const Training& want, const std::string& where,
                         double slack = 1.0) {
    for (std::size_t g = 0; g < want.gradients().size(); ++g) {
        const AnyArray &x = *got.gradients()[g], &y = *want.gradients()[g];
        // A slope's gradient sums dS times distances, up to Sk.
        double top = g == 4 ? double(want.n.Sk) : 1.0, error = 0.0;
        for (std::size_t i = 0; i < y.size(); ++i) {
            if (std::isfinite(y[i])) top = std::max(top, std::abs(y[i]));
        }
        for (std::size_t i = 0; i < y.size(); ++i) {
            const double at = std::abs(x[i] - y[i]);
            if (std::isfinite(y[i]))
                error = at <= error || std::isnan(error) ? error : at;  // NaN stays
            else
                EXPECT_FALSE(std::isfinite(x[i])) << where << ", gradient " << g << ", element " << i;
        }
        EXPECT_LE(error, slack * tolerance(want.dtype) * top) << where << ", gradient " << g;
    }
}

}  // namespace fastattn::testing
