// Vec for AVX2 with FMA and F16C: 8 floats or 4 doubles.
#pragma once

#include <immintrin.h>

#include "cpu/simd/vec.h"

namespace fastattn::cpu {
namespace {

struct Avx2 {};

template <>
struct Vec<float, Avx2> {
    static constexpr int width = 8;
    static constexpr int registers = 16;
    using value_type = float;
    using Mask = __m256;
    __m256 v;

    static FASTATTN_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
    static FASTATTN_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
    static FASTATTN_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)}; }
    static FASTATTN_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static FASTATTN_INLINE Vec load_part(const float* p, int n) {
        const __m256i rest =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        return {_mm256_maskload_ps(p, rest)};
    }
    static FASTATTN_INLINE Vec load(const f16_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static FASTATTN_INLINE Vec load(const bf16_t* p) {
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
    }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_cmpgt_epi32(x, _mm256_setzero_si256()));
    }
    FASTATTN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
    FASTATTN_INLINE void store(f16_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    FASTATTN_INLINE void store(bf16_t* p) const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i high = _mm256_srli_epi32(bits, 16);
        const __m256i bias =
            _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
        const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
        const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    static FASTATTN_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) {
        return {_mm256_or_ps(a.v, _mm256_and_ps(b.v, _mm256_set1_ps(-0.0f)))};
    }
    static FASTATTN_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, 8)}; }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) {
        const __m256 k = _mm256_min_ps(_mm256_set1_ps(127.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), n.v));
        const __m256i e =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23);
        return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
    }
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        const Vec y = max(set1(-127.0f), x);
        const Vec n = {_mm256_floor_ps(y.v)};
        r = y - n;
        return n;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) {  // n >= -127: scale2 without its limits
        const __m256i e =
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
        return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(e))};
    }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
    static FASTATTN_INLINE bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) {
        const __m256 lo = _mm256_unpacklo_ps(a.v, b.v), hi = _mm256_unpackhi_ps(a.v, b.v);
        return {_mm256_permute2f128_ps(lo, hi, 0x20)};
    }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) {
        const __m256 lo = _mm256_unpacklo_ps(a.v, b.v), hi = _mm256_unpackhi_ps(a.v, b.v);
        return {_mm256_permute2f128_ps(lo, hi, 0x31)};
    }
    typedef std::uint32_t Words __attribute__((vector_size(32)));
    static FASTATTN_INLINE void mul_wide(Words a, std::uint32_t m, Words& hi, Words& lo) {
        const __m256i x = (__m256i)a, y = _mm256_set1_epi64x(static_cast<std::int64_t>(m));
        const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
        hi = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
        lo = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    }
    static FASTATTN_INLINE float first(Vec a) { return _mm256_cvtss_f32(a.v); }
    static FASTATTN_INLINE float reduce_max(Vec a) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
    }
    static FASTATTN_INLINE float reduce_add(Vec a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
    }
};

template <>
struct Vec<double, Avx2> {
    static constexpr int width = 4;
    static constexpr int registers = 16;
    using value_type = double;
    using Mask = __m256d;
    __m256d v;

    static FASTATTN_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
    static FASTATTN_INLINE Vec set1(double x) { return {_mm256_set1_pd(x)}; }
    static FASTATTN_INLINE Vec iota() { return {_mm256_setr_pd(0, 1, 2, 3)}; }
    static FASTATTN_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
    static FASTATTN_INLINE Vec load_part(const double* p, int n) {
        const __m256i rest = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
        return {_mm256_maskload_pd(p, rest)};
    }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        std::int32_t four;
        std::memcpy(&four, p, 4);
        const __m256i x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        return _mm256_castsi256_pd(_mm256_cmpgt_epi64(x, _mm256_setzero_si256()));
    }
    FASTATTN_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
    static FASTATTN_INLINE Vec abs(Vec a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) {
        return {_mm256_or_pd(a.v, _mm256_and_pd(b.v, _mm256_set1_pd(-0.0)))};
    }
    static FASTATTN_INLINE Vec round(Vec a) { return {_mm256_round_pd(a.v, 8)}; }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) {
        // Integer conversion by the magic number 1.5 * 2^52: the low mantissa bits hold n.
        const __m256d k = _mm256_min_pd(_mm256_set1_pd(1023.0), _mm256_max_pd(_mm256_set1_pd(-1023.0), n.v));
        const __m256d magic = _mm256_set1_pd(6755399441055744.0 + 1023.0);
        const __m256i e = _mm256_slli_epi64(_mm256_castpd_si256(_mm256_add_pd(k, magic)), 52);
        return {_mm256_mul_pd(a.v, _mm256_castsi256_pd(e))};
    }
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        const Vec y = max(set1(-1023.0), x);
        const Vec n = {_mm256_floor_pd(y.v)};
        r = y - n;
        return n;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) { return scale2(a, n); }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ); }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ); }
    static FASTATTN_INLINE bool any(Mask m) { return _mm256_movemask_pd(m) != 0; }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_pd(b.v, a.v, m)}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) {
        return {_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.v, b.v), _mm256_unpackhi_pd(a.v, b.v), 0x20)};
    }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) {
        return {_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.v, b.v), _mm256_unpackhi_pd(a.v, b.v), 0x31)};
    }
    static FASTATTN_INLINE double first(Vec a) { return _mm256_cvtsd_f64(a.v); }
    static FASTATTN_INLINE double reduce_max(Vec a) {
        const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
        return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
    }
    static FASTATTN_INLINE double reduce_add(Vec a) {
        const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
        return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
    }
};

}  // namespace
}  // namespace fastattn::cpu
