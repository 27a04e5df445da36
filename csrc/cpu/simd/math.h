// exp2 and tanh over Vec. Coefficients: for 2^r on [0, 1) the polynomial of least relative error with 2^0 = 1
// (Remez), for (2^r - 1)/r on [-1/2, 1/2] or [0, 1/width) interpolation at Chebyshev nodes, or least squares;
// relative errors before rounding are given.
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

// exp2 with a table for the first bits of the fraction: 2^x = 2^floor(n) * t * (1 + r q(r)), t = 2^(n -
// floor(n)) and r in [0, 1/width). One multiplication takes the place of two to four multiply-adds.
template <Accuracy accuracy, class V>
FASTATTN_INLINE V exp2_fine(V x) {
    using T = typename V::value_type;
    V r, n, q;
    const V t = V::split_fine(x, r, n);
    if constexpr (sizeof(T) == 8) {
        static_assert(V::width == 8);
        constexpr T c[] = {0.69314718055994538898,  // 9.2e-18
                           0.24022650695903833983,   0.055504108672801254363,  0.0096181287249868339291,
                           0.0013333645453632079362, 0.0001539331891812072604, 0.000015842913201420473234};
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

// tanh(x) for y = 2 log2(e) x: u / (u + 2), u = 2^|y| - 1, with the sign of y; relative accuracy also near 0,
// where softcap is the identity. Of |y|, as an error of u counts twice where u is near -1.
template <class V>
FASTATTN_INLINE V tanh_log2(V y) {
    using T = typename V::value_type;
    const V limit = V::set1(sizeof(T) == 8 ? T(116) : T(58));  // tanh is 1 to the last bit from half of it on
    const V size = V::min(limit, V::abs(y));
    const V n = V::round(size);
    const V r = size - n;
    V q;  // (2^r - 1) / r
    if constexpr (sizeof(T) == 8) {
        constexpr T c[] = {
            0.693147180559945309417,  // 4e-23
            0.240226506959100712334,      0.055504108664821579944,    0.00961812910762847716158,
            0.00133335581464284492875,    0.000154035303933816124944, 0.0000152527338040457672062,
            0.00000132154867901382137907, 1.01780860253219110582e-7,  7.05491162776713380771e-9,
            4.44552883835549174789e-10,   2.56783951315479906184e-11, 1.37189234102621641283e-12,
            6.7906102313392341858e-14};
        q = horner(r, c);
    } else {
        constexpr T c[] = {0.693147188f,    0.2402265076f,   0.05550357114f,
                           0.009618082557f, 0.001339086336f, 0.0001545316295f};  // 1.2e-8
        q = horner(r, c);
    }
    const V one = V::set1(T(1));
    const V two_n = V::scale2(one, n);
    const V u = V::fma(two_n, r * q, two_n - one);
    return V::copysign(u / (u + V::set1(T(2))), y);
}

template <class V>
FASTATTN_INLINE V tanh(V x) {
    return tanh_log2(x * V::set1(typename V::value_type(2.8853900817779268147)));
}

}  // namespace
}  // namespace fastattn::cpu
