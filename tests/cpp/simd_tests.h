// One body per behaviour of the Vec contract (csrc/cpu/simd/vec.h) and of what is built on it; each
// test_simd_<isa>.cpp instantiates it with FASTATTN_SIMD_TESTS(Isa, rows, vectors).
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/keys.h"
#include "cpu/flash/decode.h"
#include "cpu/flash/gemm.h"
#include "cpu/flash/pack.h"
#include "cpu/simd/math.h"

namespace fastattn::cpu {
namespace {

template <class V>
std::vector<typename V::value_type> lanes(V x) {
    std::vector<typename V::value_type> out(V::width);
    x.store(out.data());
    return out;
}

template <class V>
V from(const std::vector<typename V::value_type>& x) {
    return V::load(x.data());
}

// Distance in units in the last place of T.
template <class T>
double ulps(T got, double exact) {
    if (got == static_cast<T>(exact)) return 0;
    const double size = std::fabs(exact);
    const double ulp = std::ldexp(std::numeric_limits<T>::epsilon(), std::ilogb(size));
    return std::fabs(static_cast<double>(got) - exact) / ulp;
}

template <class V>
void check_arithmetic() {
    using T = typename V::value_type;
    std::mt19937 rng(1);
    std::uniform_real_distribution<T> dist(-8, 8);
    std::vector<T> a(V::width), b(V::width), c(V::width);
    for (int i = 0; i < V::width; ++i) a[i] = dist(rng), b[i] = dist(rng), c[i] = dist(rng);
    const V x = from<V>(a), y = from<V>(b), z = from<V>(c);
    T sum = 0, top = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < V::width; ++i) {
        EXPECT_EQ(lanes(x + y)[i], a[i] + b[i]);
        EXPECT_EQ(lanes(x - y)[i], a[i] - b[i]);
        EXPECT_EQ(lanes(x * y)[i], a[i] * b[i]);
        EXPECT_EQ(lanes(x / y)[i], a[i] / b[i]);
        EXPECT_EQ(lanes(V::max(x, y))[i], std::max(a[i], b[i]));
        EXPECT_EQ(lanes(V::min(x, y))[i], std::min(a[i], b[i]));
        EXPECT_EQ(lanes(V::abs(x))[i], std::abs(a[i]));
        EXPECT_EQ(lanes(V::copysign(V::abs(x), y))[i], std::copysign(a[i], b[i]));
        EXPECT_EQ(std::signbit(lanes(V::copysign(V::zero(), y))[i]), b[i] < 0);
        EXPECT_EQ(lanes(V::round(x))[i], std::nearbyint(a[i]));
        EXPECT_NEAR(lanes(V::fma(x, y, z))[i], a[i] * b[i] + c[i], 64 * std::numeric_limits<T>::epsilon());
        EXPECT_EQ(lanes(V::select(V::gt(x, y), x, z))[i], a[i] > b[i] ? a[i] : c[i]);
        EXPECT_EQ(lanes(V::iota())[i], T(i));
        sum += a[i];
        top = std::max(top, a[i]);
    }
    EXPECT_NEAR(V::reduce_add(x), sum, 64 * std::numeric_limits<T>::epsilon());
    EXPECT_EQ(V::reduce_max(x), top);
    EXPECT_TRUE(V::any(V::eq(x, x)));
    EXPECT_FALSE(V::any(V::gt(x, x)));
}

template <class V>
void check_nan_rules() {
    using T = typename V::value_type;
    const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
    const V one = V::set1(1), not_a_number = V::set1(nan);
    EXPECT_TRUE(std::isnan(lanes(V::max(one, not_a_number))[0]));  // the second where either is NaN
    EXPECT_EQ(lanes(V::max(not_a_number, one))[0], 1);
    EXPECT_TRUE(std::isnan(lanes(V::min(one, not_a_number))[0]));
    EXPECT_EQ(lanes(V::min(not_a_number, one))[0], 1);
    EXPECT_FALSE(V::any(V::gt(not_a_number, one)));
    EXPECT_FALSE(V::any(V::eq(not_a_number, not_a_number)));
    EXPECT_TRUE(std::isnan(lanes(exp2(not_a_number))[0]));
    EXPECT_EQ(lanes(exp2(V::set1(-inf)))[0], 0);
    EXPECT_EQ(lanes(exp2(V::zero()))[0], 1);
    EXPECT_TRUE(std::isnan(lanes(tanh(not_a_number))[0]));
    EXPECT_EQ(lanes(tanh(V::set1(inf)))[0], 1);
    EXPECT_EQ(lanes(tanh(V::set1(-inf)))[0], -1);
    EXPECT_EQ(lanes(tanh(V::zero()))[0], 0);
}

template <class V>
void check_scale2() {
    using T = typename V::value_type;
    const int top = sizeof(T) == 4 ? 120 : 1000;
    for (int n = -top; n <= top; n += 7) {
        EXPECT_EQ(lanes(V::scale2(V::set1(T(1.5)), V::set1(T(n))))[0], std::ldexp(T(1.5), n)) << n;
    }
    for (double a : {0.5, 1.5, 2.5, -0.5, -1.5, 4194304.5, 4194305.5, -4194304.5, 5e8, -3e9}) {
        EXPECT_EQ(lanes(V::round(V::set1(T(a))))[0], std::nearbyint(T(a))) << a;
    }
    EXPECT_EQ(lanes(V::scale2(V::set1(1), V::set1(T(-1100))))[0], 0);
    EXPECT_EQ(lanes(V::scale2(V::set1(1), V::set1(-std::numeric_limits<T>::infinity())))[0], 0);
}

template <class V>
void check_exp2() {
    using T = typename V::value_type;
    double worst = 0, worst_bf16 = 0;
    const double low = sizeof(T) == 4 ? -120 : -1000;
    for (double x = low; x <= 9; x += 0.0137) {
        const T arg = static_cast<T>(x);
        worst = std::max(worst, ulps(lanes(exp2(V::set1(arg)))[0], std::exp2(static_cast<double>(arg))));
        const double exact = std::exp2(static_cast<double>(arg));
        worst_bf16 =
            std::max(worst_bf16, std::fabs(lanes(exp2<Accuracy::bf16>(V::set1(arg)))[0] / exact - 1));
    }
    EXPECT_LT(worst, 3.0);
    for (const double x : {-3.0, -2.75, -0.5, 0.0, 0.25, 6.0, 7.5}) {
        V r;
        const V n = V::split2(V::set1(T(x)), r);
        EXPECT_EQ(lanes(r)[0], T(x - std::floor(x))) << x;
        EXPECT_EQ(lanes(V::shift2(V::set1(1), n))[0], T(std::exp2(std::floor(x)))) << x;
    }
    EXPECT_LT(worst_bf16, 4e-6);  // of the polynomial 2.9e-6, the rest is rounding
}

template <class V>
void check_tanh() {
    using T = typename V::value_type;
    double worst = 0, worst_near_one = 0;  // where a softcap's scores are large, and their errors too
    for (double x = 1e-6; x <= 30; x *= 1.0037) {
        const T arg = static_cast<T>(x);
        const double exact = std::tanh(static_cast<double>(arg));
        const double above = ulps(lanes(tanh(V::set1(arg)))[0], exact),
                     below = ulps(lanes(tanh(V::set1(-arg)))[0], -exact);
        worst = std::max({worst, above, below});
        if (x > 2) worst_near_one = std::max({worst_near_one, above, below});
    }
    EXPECT_LT(worst, 4.0);
    EXPECT_LT(worst_near_one, 2.0);
}

template <class V>
void check_shuffles() {
    using T = typename V::value_type;
    constexpr int w = V::width;
    V rows[w], sums[w];
    for (int i = 0; i < w; ++i) {
        rows[i] = V::iota() + V::set1(T(100 * i));
        sums[i] = rows[i];
    }
    transpose(rows);
    for (int i = 0; i < w; ++i) {
        for (int j = 0; j < w; ++j) EXPECT_EQ(lanes(rows[i])[j], T(100 * j + i)) << i << ' ' << j;
    }
    const auto each = lanes(reduce_each(sums));
    for (int i = 0; i < w; ++i) EXPECT_EQ(each[i], T(100 * i * w + w * (w - 1) / 2));
}

template <class V>
void check_loads() {
    using T = typename V::value_type;
    constexpr int w = V::width;
    std::vector<T> data(static_cast<std::size_t>(4 * w));
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = T(i) + 1;
    for (int n = 0; n <= w; ++n) {
        const auto part = lanes(load_n<V>(data.data(), n));
        const auto strided = lanes(load_strided<V>(data.data() + 2, 3, n));
        const auto backwards = lanes(load_strided<V>(data.data() + w, -1, n));
        for (int i = 0; i < w; ++i) {
            EXPECT_EQ(part[i], i < n ? T(i + 1) : T(0));
            EXPECT_EQ(strided[i], i < n ? T(3 + 3 * i) : T(0));
            EXPECT_EQ(backwards[i], i < n ? T(w + 1 - i) : T(0));
        }
        std::vector<T> out(static_cast<std::size_t>(2 * w), T(-1));
        store_strided(V::iota(), out.data(), 2, n);
        for (int i = 0; i < w; ++i) {
            EXPECT_EQ(out[2 * i], i < n ? T(i) : T(-1));
            EXPECT_EQ(out[2 * i + 1], T(-1));
        }
    }
    std::vector<std::uint8_t> bytes(64);
    for (int i = 0; i < w; ++i) bytes[i] = static_cast<std::uint8_t>(i % 2 == 0 ? 0 : 255);
    for (int i = 0; i < w; ++i)
        EXPECT_EQ(lanes(V::select(V::mask_bytes(bytes.data()), V::set1(1), V::zero()))[i] > 0, i % 2 == 1);
}

// Every f16 and bf16 value is read right, and floats are rounded as core/half.h does.
template <class V>
void check_halves() {
    constexpr int w = V::width;
    std::mt19937 rng(7);
    f16_t half[w];
    bf16_t brain[w];
    for (std::uint32_t first = 0; first < 65536; first += w) {
        for (int i = 0; i < w; ++i) {
            half[i].bits = static_cast<std::uint16_t>(first + static_cast<std::uint32_t>(i));
            brain[i].bits = half[i].bits;
        }
        const auto h = lanes(V::load(half)), b = lanes(V::load(brain));
        std::vector<float> any(w);
        for (int i = 0; i < w; ++i) {
            const float exact_h = f16_to_f32(half[i].bits), exact_b = bf16_to_f32(brain[i].bits);
            EXPECT_TRUE(h[i] == exact_h || (std::isnan(h[i]) && std::isnan(exact_h))) << half[i].bits;
            EXPECT_TRUE(b[i] == exact_b || (std::isnan(b[i]) && std::isnan(exact_b))) << brain[i].bits;
            any[i] = f32_from_bits(static_cast<std::uint32_t>(rng()));
            if (i % 3 == 0) any[i] = std::ldexp(any[i], -static_cast<int>(rng() % 100));
        }
        f16_t to_half[w];
        bf16_t to_brain[w];
        from<V>(any).store(to_half);
        from<V>(any).store(to_brain);
        for (int i = 0; i < w; ++i) {
            if (std::isnan(any[i])) {
                EXPECT_TRUE(std::isnan(f16_to_f32(to_half[i].bits)) &&
                            std::isnan(bf16_to_f32(to_brain[i].bits)));
            } else {
                EXPECT_EQ(to_half[i].bits, f32_to_f16(any[i])) << any[i];
                EXPECT_EQ(to_brain[i].bits, f32_to_bf16(any[i])) << any[i];
            }
        }
    }
}

// Many blocks at once are the blocks one by one.
template <class V>
void check_philox() {
    typename V::Words words[4];
    philox_words<V>(0xfffffff0u, 5, 0x80000001u, 0xffffffffu, 0x123456789abcdef0u, words);
    for (int i = 0; i < V::width; ++i) {
        const PhiloxBlock one = philox4x32(0xfffffff0u + static_cast<std::uint32_t>(i), 5, 0x80000001u,
                                           0xffffffffu, 0x123456789abcdef0u);
        for (int k = 0; k < 4; ++k) EXPECT_EQ(words[k][i], one.word[k]) << i << ' ' << k;
    }
}

template <bool uses_vectors>
struct SideSteps {
    static constexpr int steps = 5;
    static constexpr bool vectors = uses_vectors;
    int done = 0;
    void operator()(int step) { EXPECT_EQ(step, done++); }
};

// The keys of one head that lie in x.
template <class S>
KeyRows<S> rows_of(std::vector<S>& x, std::int64_t row_stride, std::int64_t dim_stride) {
    Operand from;
    from.data = x.data();
    from.seq = row_stride;
    from.dim = dim_stride;
    return {from, 0, 0};
}

// q (rows, d) . k (keys, d), packed and multiplied, against plain loops; S has any strides.
template <class E, class S>
void check_packed_product(std::int64_t keys, std::int64_t d, std::int64_t dim_stride) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    using V = typename E::V;
    std::mt19937 rng(3);
    std::normal_distribution<float> dist;
    const std::int64_t row_stride = d * dim_stride + 5, units = (d + E::scalars - 1) / E::scalars;
    const std::int64_t q_stride = (units + V::width - 1) / V::width * V::width;
    std::vector<S> q(static_cast<std::size_t>(E::mr * row_stride)),
        k(static_cast<std::size_t>(keys * row_stride));
    for (auto& x : q) from_scalar(static_cast<Acc>(dist(rng)), &x);
    for (auto& x : k) from_scalar(static_cast<Acc>(dist(rng)), &x);
    const std::int64_t padded = (keys + E::nr - 1) / E::nr * E::nr;
    std::vector<Unit> qp(static_cast<std::size_t>(E::mr * q_stride));
    std::vector<Unit> kp(static_cast<std::size_t>(padded * units), Unit(7));
    for (int m = 0; m < E::mr; ++m)
        pack_row<E>(qp.data() + m * q_stride, q.data() + m * row_stride, dim_stride, d);
    pack_keys<E>(kp.data(), rows_of(k, row_stride, dim_stride), keys, d);
    for (std::int64_t c = 0; c < padded; c += E::nr) {
        V acc[E::mr][E::nv];
        // Work on the side changes nothing, and each step of it is done once, beside the product or before
        // it.
        const auto multiply = [&](auto side, bool alone) {
            if (!alone) run_before<E>(side);
            for (auto& row : acc) {
                for (auto& x : row) x = V::zero();
            }
            gemm_tile_with<E, E::mr, E::nv>(acc, qp.data(), q_stride, kp.data() + c * units, E::nr, units,
                                            alone, side);
            EXPECT_EQ(side.done, alone ? 0 : side.steps);
        };
        if (c % (2 * E::nr) == 0) {
            multiply(SideSteps<true>{}, false);
        } else {
            multiply(SideSteps<false>{}, c % (3 * E::nr) != 0);
        }
        for (int m = 0; m < E::mr; ++m) {
            // Keys beyond the last one are zeros up to a whole vector.
            const std::int64_t filled = (keys + V::width - 1) / V::width * V::width;
            for (int n = 0; n < E::nr && c + n < filled; ++n) {
                double exact = 0, size = 0;
                for (std::int64_t i = 0; i < d && c + n < keys; ++i) {
                    const double x = to_scalar(q[static_cast<std::size_t>(m * row_stride + i * dim_stride)]);
                    const double y =
                        to_scalar(k[static_cast<std::size_t>((c + n) * row_stride + i * dim_stride)]);
                    exact += x * y;
                    size += std::fabs(x * y);
                }
                EXPECT_NEAR(lanes(acc[m][n / V::width])[n % V::width], exact,
                            4 * size * std::numeric_limits<Acc>::epsilon());
            }
        }
    }
}

// Values come out of their panels as they were, NaN and Inf as 0 and reported.
template <class E, class S>
void check_packed_values(std::int64_t keys, std::int64_t dv, std::int64_t dim_stride, bool with_nan) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    const std::int64_t row_stride = dv * dim_stride + 3, block = (keys + E::nr - 1) / E::nr * E::nr;
    const std::int64_t panels = (dv + E::nr - 1) / E::nr, units = block / E::scalars;
    std::vector<S> v(static_cast<std::size_t>(keys * row_stride));
    for (std::size_t i = 0; i < v.size(); ++i)
        from_scalar(static_cast<Acc>(static_cast<double>(i % 97) - 40), &v[i]);
    const std::int64_t bad_key = keys / 2, bad_column = dv - 1;
    if (with_nan) {
        from_scalar(std::numeric_limits<Acc>::infinity(),
                    &v[static_cast<std::size_t>(bad_key * row_stride + bad_column * dim_stride)]);
    }
    std::vector<Unit> packed(static_cast<std::size_t>(panels * E::nr * units), Unit(7));
    std::vector<std::uint8_t> bad(static_cast<std::size_t>(block));
    const auto rows = rows_of(v, row_stride, dim_stride);
    EXPECT_EQ(pack_values<E>(packed.data(), bad.data(), rows, keys, block, block, dv), with_nan);
    for (std::int64_t j = 0; j < block; ++j) {
        if (with_nan && j / E::scalars != bad_key / E::scalars) {
            EXPECT_FALSE(bad[static_cast<std::size_t>(j)]);
        } else if (with_nan && j == bad_key) {
            EXPECT_TRUE(bad[static_cast<std::size_t>(j)]);
        }
        for (std::int64_t c = 0; c < dv; ++c) {
            const Unit* row = packed.data() + (c / E::nr) * units * E::nr + (j / E::scalars) * E::nr;
            Acc expected = j < keys
                               ? Acc(to_scalar(v[static_cast<std::size_t>(j * row_stride + c * dim_stride)]))
                               : Acc(0);
            if (with_nan && j == bad_key && c == bad_column) expected = 0;
            // weight() reads scalar (unit, half) of a row of units: the same layout as here.
            EXPECT_EQ(E::weight(row, (c % E::nr) * E::scalars + j % E::scalars), expected) << j << ' ' << c;
        }
    }
}

template <class E, class S>
void check_engine() {
    for (std::int64_t d : {1, 3, 16, 33, 64}) {
        for (std::int64_t keys : {1, 5, E::nr, E::nr + 3}) {
            for (std::int64_t stride : {1, 2}) {
                check_packed_product<E, S>(keys, d, stride);
                check_packed_values<E, S>(keys, d, stride, false);
                check_packed_values<E, S>(keys, d, stride, true);
            }
        }
    }
}

// The first n numbers of a row, whatever lies beside them, and not a byte beyond.
template <class V, class S>
void check_parts() {
    constexpr int w = V::width, around = 3;
    for (int n = -1; n <= w; ++n) {
        const int some = n > 0 ? n : 0;
        std::vector<S> row(some + 2 * around);
        for (S& x : row) from_scalar(std::numeric_limits<float>::quiet_NaN(), &x);
        for (int i = 0; i < some; ++i) from_scalar(1.5f + static_cast<float>(i), &row[around + i]);
        const V x = load_n<V>(row.data() + around, n);
        for (int i = 0; i < w; ++i) EXPECT_EQ(lanes(x)[i], i < some ? 1.5f + static_cast<float>(i) : 0);
        store_strided(x + V::set1(1), row.data() + around, 1, n);
        for (int i = 0; i < some; ++i) EXPECT_EQ(to_scalar(row[around + i]), 2.5f + static_cast<float>(i));
        for (int i = 0; i < around; ++i) {
            EXPECT_TRUE(std::isnan(to_scalar(row[i])));
            EXPECT_TRUE(std::isnan(to_scalar(row[around + some + i])));
        }
    }
}

}  // namespace
}  // namespace fastattn::cpu

#define FASTATTN_SIMD_TESTS(Isa, rows, vectors)                                          \
    namespace fastattn::cpu {                                                            \
    namespace {                                                                          \
    using F = Vec<float, Isa>;                                                           \
    using D = Vec<double, Isa>;                                                          \
    TEST(Simd, Arithmetic) { check_arithmetic<F>(), check_arithmetic<D>(); }             \
    TEST(Simd, NanRules) { check_nan_rules<F>(), check_nan_rules<D>(); }                 \
    TEST(Simd, Scale2) { check_scale2<F>(), check_scale2<D>(); }                         \
    TEST(Simd, Philox) { check_philox<F>(); }                                            \
    TEST(Simd, Exp2Ulps) { check_exp2<F>(), check_exp2<D>(); }                           \
    TEST(Simd, TanhUlps) { check_tanh<F>(), check_tanh<D>(); }                           \
    TEST(Simd, Shuffles) { check_shuffles<F>(), check_shuffles<D>(); }                   \
    TEST(Simd, Loads) { check_loads<F>(), check_loads<D>(); }                            \
    TEST(Simd, Halves) { check_halves<F>(); }                                            \
    TEST(Simd, Parts) {                                                                  \
        check_parts<F, float>(), check_parts<F, f16_t>(), check_parts<F, bf16_t>();      \
        check_parts<D, double>();                                                        \
    }                                                                                    \
    TEST(Engine, F64) { check_engine<FmaEngine<double, Isa, rows, vectors>, double>(); } \
    TEST(Engine, F32) { check_engine<FmaEngine<float, Isa, rows, vectors>, float>(); }   \
    TEST(Engine, F16) { check_engine<FmaEngine<float, Isa, rows, vectors>, f16_t>(); }   \
    TEST(Engine, Bf16) { check_engine<FmaEngine<float, Isa, rows, vectors>, bf16_t>(); } \
    }                                                                                    \
    }
