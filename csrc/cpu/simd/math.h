// exp2 and tanh over Vec. Coefficients: for 2^r on [0, 1) the polynomial of least relative error with 2^0 = 1
// (Remez), for (e^r - 1 - r)/r^2 interpolation at Chebyshev nodes of [-ln2/2, ln2/2]; relative errors before
// rounding are given.
#pragma once

#include "cpu/simd/vec.h"

namespace fastattn::cpu {
namespace {

// How exact a weight needs to be: full for its type, or enough to be rounded to bf16 afterwards.
enum class Accuracy { full, bf16 };

template <class V, std::size_t N>
FASTATTN_INLINE V horner(V x, const typename V::value_type (&c)[N]) {
    V r = V::set1(c[N - 1]);
    for (std::size_t i = N - 1; i-- > 0;) r = V::fma(r, x, V::set1(c[i]));
    return r;
}

// exp2 with a table for the first bits of the fraction: 2^x = 2^floor(n) * t * (1 + r q(r)), t = 2^(n - floor(n))
// and r in [0, 1/width). One multiplication takes the place of two to four multiply-adds.
template <Accuracy accuracy, class V>
FASTATTN_INLINE V exp2_fine(V x) {
    using T = typename V::value_type;
    V r, n, q;
    const V t = V::split_fine(x, r, n);
    if constexpr (sizeof(T) == 8) {
        static_assert(V::width == 8);
        constexpr T c[] = {0.69314718055994538898,  // 9.2e-18
                           0.24022650695903833983,
                           0.055504108672801254363,
                           0.0096181287249868339291,
                           0.0013333645453632079362,
                           0.0001539331891812072604,
                           0.000015842913201420473234};
        q = horner(r, c);
    } else if constexpr (accuracy == Accuracy::bf16) {
        static_assert(V::width == 16);
        constexpr T c[] = {0.693053f, 0.24510145f};  // 5.2e-7
        q = horner(r, c);
    } else {
        static_assert(V::width == 16);
        constexpr T c[] = {0.6931476f, 0.24018425f, 0.0566699f};  // 1.4e-9
        q = horner(r, c);
    }
    return V::shift2(V::fma(t * r, q, t), n);
}

// 2^x = 2^floor(x) * 2^r. NaN stays NaN, -inf gives 0; x up to 127 (float) or 1023 (double). Results under
// the smallest normal number may be flushed to 0.
template <Accuracy accuracy = Accuracy::full, class V>
FASTATTN_INLINE V exp2(V x) {
    using T = typename V::value_type;
    V r;
    if constexpr (requires(V n) { V::split_fine(x, r, n); }) {
        return exp2_fine<accuracy>(x);
    } else if constexpr (sizeof(T) == 8) {
        const V n = V::split2(x, r);
        constexpr T c[] = {1.0,  // 3e-18
                           0.69314718055994592842,
                           0.24022650695906330204,
                           0.055504108665602253297,
                           0.0096181290995507955717,
                           0.0013333558629566755226,
                           0.00015403512309628660399,
                           0.000015253175055562795993,
                           1.3208367288951140366e-6,
                           1.0253212435721934234e-7,
                           6.559529322770528367e-9,
                           6.2634661422960210149e-10};
        return V::shift2(horner(r, c), n);
    } else if constexpr (accuracy == Accuracy::bf16) {
        const V n = V::split2(x, r);
        constexpr T c[] = {1.0f, 0.693044845f, 0.241280204f, 0.0522424753f, 0.0134266837f};  // 2.9e-6
        return V::shift2(horner(r, c), n);
    } else {
        const V n = V::split2(x, r);
        constexpr T c[] = {1.0f,          0.693151312f,   0.24016445f,
                           0.0557999134f, 0.00901702996f, 0.00186713021f};  // 8.2e-8
        return V::shift2(horner(r, c), n);
    }
}

// tanh(x) = u / (u + 2), u = e^2x - 1; relative accuracy also near 0, where softcap is the identity.
template <class V>
FASTATTN_INLINE V tanh(V x) {
    using T = typename V::value_type;
    constexpr bool wide = sizeof(T) == 8;
    const V limit = V::set1(wide ? T(40) : T(20));  // tanh is 1 to the last bit from half of it on
    const V y = V::max(V::zero() - limit, V::min(limit, x + x));
    const V n = V::round(y * V::set1(T(1.4426950408889634)));
    // ln2 in two parts, the first with trailing zeros, so that n * ln2 is subtracted exactly.
    const V hi = V::set1(wide ? T(0.6931471803691238) : T(0.693359375));
    const V lo = V::set1(wide ? T(1.9082149292705877e-10) : T(-2.12194440e-4));
    const V r = V::fma(V::zero() - n, lo, V::fma(V::zero() - n, hi, y));
    V q;
    if constexpr (wide) {
        constexpr T c[] = {0.5,
                           0.16666666666666666667,
                           0.041666666666666676764,  // 7e-21
                           0.0083333333333333340064,
                           0.0013888888888879081845,
                           0.00019841269841263304362,
                           0.000024801587336421322573,
                           2.7557319247204790278e-6,
                           2.7557263301474754518e-7,
                           2.5052071109214448293e-8,
                           2.0918129454967065736e-9,
                           1.6086622436215553425e-10};
        q = horner(r, c);
    } else {
        constexpr T c[] = {0.5f,           0.166666667f,   0.041666465f,
                           0.00833331093f, 0.00139336410f, 0.000198909810f};  // 5e-10
        q = horner(r, c);
    }
    const V em1 = V::fma(r * r, q, r);
    const V one = V::set1(T(1));
    const V two_n = V::scale2(one, n);
    const V u = V::fma(two_n, em1, two_n - one);
    return u / (u + V::set1(T(2)));
}

}  // namespace
}  // namespace fastattn::cpu
