// The contract of a SIMD vector, and its portable implementation.
//
// Vec<T, Isa> holds `width` lanes of T (float or double). Every ISA gives the same static and member
// functions; the algorithms are templates over Vec and never name an intrinsic. All of it lives in an
// anonymous namespace: each ISA file is compiled with its own instruction set, and nothing of it may
// be merged by the linker into code for another CPU.
//
//   width registers                   lanes; vectors that the instruction set has names for
//   zero() set1(x) iota()             constants; iota = 0, 1, 2, ...
//   load(p) store(p)                  p: T*, f16_t*, bf16_t* (conversion rounds to nearest even)
//   load_part(p, n) store_part(p, n)  where masks are cheap: n < width numbers, zeros beyond; n may be 0
//   mask_bytes(p)                     the mask of the bytes that are not 0
//   fma(a,b,c) = a*b+c, + - * /       lanes
//   max(a,b) min(a,b)                 b when either is NaN
//   abs(a) copysign(a, b)             |a|; a, which is not negative, with the sign of b
//   round(a)                          to nearest even
//   scale2(a, n)                      a * 2^n, n integral in [-1100, 1100]; underflow may flush to 0
//   split2(x, r) shift2(a, n)         r = x - floor(x), and the n for which shift2 is a * 2^floor(x); -inf: 0
//   split_fine(x, r, n)               where a table is cheap: exp2_fine in math.h
//   sum_each(r)                       where interleaving is not the best way: width vectors to their sums
//   gt(a,b) eq(a,b) any(m) select(m,a,b)    masks; select = m ? a : b
//   Words, mul_wide(a, m, hi, lo)     float only: as many 32-bit words; the halves of a * m
//   interleave_lo/hi(a,b)             a0 b0 a1 b1 ... of the lower / upper halves
//   first(a) reduce_max(a) reduce_add(a)    to a scalar
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/half.h"

#if defined(_MSC_VER)
#define FASTATTN_INLINE __forceinline
#else
#define FASTATTN_INLINE inline __attribute__((always_inline))
#endif

namespace fastattn::cpu {
namespace {

struct f16_t {
    std::uint16_t bits;
};
struct bf16_t {
    std::uint16_t bits;
};

struct Scalar {};

template <class T, class Isa>
struct Vec;

// Scalar conversions between storage types and the compute type.
FASTATTN_INLINE double to_scalar(double x) { return x; }
FASTATTN_INLINE float to_scalar(float x) { return x; }
FASTATTN_INLINE float to_scalar(f16_t x) { return f16_to_f32(x.bits); }
FASTATTN_INLINE float to_scalar(bf16_t x) { return bf16_to_f32(x.bits); }
FASTATTN_INLINE void from_scalar(double x, double* p) { *p = x; }
FASTATTN_INLINE void from_scalar(float x, float* p) { *p = x; }
FASTATTN_INLINE void from_scalar(float x, f16_t* p) { p->bits = f32_to_f16(x); }
FASTATTN_INLINE void from_scalar(float x, bf16_t* p) { p->bits = f32_to_bf16(x); }

// Partial and strided access: through a buffer of one vector where the ISA has nothing better.
template <class V, class S>
FASTATTN_INLINE V load_n(const S* p, std::int64_t n) {
    if (n >= V::width) return V::load(p);
    if constexpr (requires { V::load_part(p, 0); }) return V::load_part(p, n > 0 ? static_cast<int>(n) : 0);
    alignas(64) S buffer[V::width] = {};
    for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return V::load(buffer);
}
template <class V, class S>
FASTATTN_INLINE V load_strided(const S* p, std::int64_t stride, std::int64_t n) {
    if (stride == 1) return load_n<V>(p, n);
    alignas(64) S buffer[V::width] = {};
    for (std::int64_t i = 0; i < n && i < V::width; ++i) buffer[i] = p[i * stride];
    return V::load(buffer);
}
template <class V, class S>
FASTATTN_INLINE void store_strided(V x, S* p, std::int64_t stride, std::int64_t n) {
    if (stride == 1 && n >= V::width) {
        x.store(p);
        return;
    }
    if constexpr (requires { x.store_part(p, 0); }) {
        if (stride == 1) {
            x.store_part(p, n > 0 ? static_cast<int>(n) : 0);
            return;
        }
    }
    alignas(64) S buffer[V::width];
    x.store(buffer);
    for (std::int64_t i = 0; i < n && i < V::width; ++i) p[i * stride] = buffer[i];
}

// ---- portable implementation: 16-byte vectors of the compiler, on whatever the baseline has ---------
template <class T>
struct Vec<T, Scalar> {
    static constexpr int width = 16 / sizeof(T);
    static constexpr int registers = 16;  // those of x86-64 without more
    using value_type = T;
    typedef T Lanes __attribute__((vector_size(16)));
    using Mask = decltype(Lanes{} > Lanes{});  // lanes of all ones or zeros
    Lanes v;

    template <class F>
    static FASTATTN_INLINE Vec generate(F f) {
        Vec r;
        for (int i = 0; i < width; ++i) r.v[i] = f(i);
        return r;
    }
    static FASTATTN_INLINE Vec zero() { return {Lanes{}}; }
    static FASTATTN_INLINE Vec set1(T x) { return {Lanes{} + x}; }
    static FASTATTN_INLINE Vec iota() {
        return generate([](int i) { return T(i); });
    }
    static FASTATTN_INLINE Vec load(const T* p) {
        Vec r;
        std::memcpy(&r.v, p, sizeof r.v);
        return r;
    }
    template <class S>
    static FASTATTN_INLINE Vec load(const S* p) {
        return generate([&](int i) { return T(to_scalar(p[i])); });
    }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        return generate([&](int i) { return T(p[i]); }).v > Lanes{};
    }
    FASTATTN_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof v); }
    template <class S>
    FASTATTN_INLINE void store(S* p) const {
        for (int i = 0; i < width; ++i) from_scalar(v[i], p + i);
    }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
    // Two roundings: a baseline CPU has no fused instruction, and libm's is hundreds of cycles.
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
    using Bits = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    static constexpr Bits sign = std::numeric_limits<Bits>::min();
    static FASTATTN_INLINE Vec abs(Vec a) { return {(Lanes)((Mask)a.v & ~sign)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) { return {(Lanes)((Mask)a.v | ((Mask)b.v & sign))}; }
    static FASTATTN_INLINE Vec round(Vec a) {
        // From 2^23 (2^52) on every number is integral; below, adding it rounds the fraction away.
        const Lanes whole = set1(sizeof(T) == 4 ? T(8388608.0) : T(4503599627370496.0)).v;
        const Lanes size = a.v < T(0) ? -a.v : a.v;
        const Lanes rounded = (size + whole) - whole;
        return {size < whole ? (a.v < T(0) ? -rounded : rounded) : a.v};
    }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) {
        return generate([&](int i) {
            // NaN in n would make the conversion undefined; a carries the NaN then.
            const T e = n.v[i] == n.v[i] ? n.v[i] : T(0);
            if constexpr (sizeof(T) == 4) {
                const int k = e < T(-127) ? -127 : e > T(127) ? 127 : static_cast<int>(e);
                const std::uint32_t bits = static_cast<std::uint32_t>(k + 127) << 23;
                float f;
                std::memcpy(&f, &bits, 4);
                return a.v[i] * f;
            } else {
                const int k = e < T(-1023) ? -1023 : e > T(1023) ? 1023 : static_cast<int>(e);
                const std::uint64_t bits = static_cast<std::uint64_t>(k + 1023) << 52;
                double f;
                std::memcpy(&f, &bits, 8);
                return a.v[i] * f;
            }
        });
    }
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        x = max(set1(sizeof(T) == 4 ? T(-127) : T(-1023)), x);
        const Vec n = round(x);
        const Vec floor = {n.v > x.v ? n.v - T(1) : n.v};
        r = x - floor;
        return floor;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) { return scale2(a, n); }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return a.v > b.v; }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return a.v == b.v; }
    static FASTATTN_INLINE bool any(Mask m) {
        bool r = false;
        for (int i = 0; i < width; ++i) r = r || m[i] != 0;
        return r;
    }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {m ? a.v : b.v}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) {
        return generate([&](int i) { return i % 2 == 0 ? a.v[i / 2] : b.v[i / 2]; });
    }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) {
        return generate([&](int i) { return i % 2 == 0 ? a.v[(width + i) / 2] : b.v[(width + i) / 2]; });
    }
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    static FASTATTN_INLINE void mul_wide(Words a, std::uint32_t m, Words& hi, Words& lo) {
        for (int i = 0; i < 4; ++i) {
            const std::uint64_t product = std::uint64_t{a[i]} * m;
            hi[i] = static_cast<std::uint32_t>(product >> 32);
            lo[i] = static_cast<std::uint32_t>(product);
        }
    }
    static FASTATTN_INLINE T first(Vec a) { return a.v[0]; }
    static FASTATTN_INLINE T reduce_max(Vec a) {
        T r = a.v[0];
        for (int i = 1; i < width; ++i) r = a.v[i] > r ? a.v[i] : r;
        return r;
    }
    static FASTATTN_INLINE T reduce_add(Vec a) {
        T r = a.v[0];
        for (int i = 1; i < width; ++i) r += a.v[i];
        return r;
    }
};

}  // namespace
}  // namespace fastattn::cpu
