// Vec for AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles.
#pragma once

// GCC 12 takes the undefined operand of its own AVX-512 intrinsics for an uninitialised use (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "cpu/simd/vec.h"

namespace fastattn::cpu {
namespace {

struct Avx512 {};

// Round to nearest even by integer arithmetic; NaN stays NaN (quiet bit set).
FASTATTN_INLINE __m256i avx512_f32_to_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet));
}

template <>
struct Vec<float, Avx512> {
    static constexpr int width = 16;
    static constexpr int registers = 32;
    using value_type = float;
    using Mask = __mmask16;
    __m512 v;

    static FASTATTN_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
    static FASTATTN_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
    static FASTATTN_INLINE Vec iota() {
        return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    }
    static FASTATTN_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static FASTATTN_INLINE Vec load(const f16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static FASTATTN_INLINE Vec load(const bf16_t* p) {
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
    static FASTATTN_INLINE Mask lanes(int n) { return static_cast<Mask>((1u << n) - 1); }
    static FASTATTN_INLINE Vec load_part(const float* p, int n) {
        return {_mm512_maskz_loadu_ps(lanes(n), p)};
    }
    static FASTATTN_INLINE Vec load_part(const f16_t* p, int n) {
        return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))};
    }
    static FASTATTN_INLINE Vec load_part(const bf16_t* p, int n) {
        const __m256i h = _mm256_maskz_loadu_epi16(lanes(n), p);
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
    }
    FASTATTN_INLINE void store_part(float* p, int n) const { _mm512_mask_storeu_ps(p, lanes(n), v); }
    FASTATTN_INLINE void store_part(f16_t* p, int n) const {
        _mm256_mask_storeu_epi16(p, lanes(n),
                                 _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    FASTATTN_INLINE void store_part(bf16_t* p, int n) const {
        _mm256_mask_storeu_epi16(p, lanes(n), avx512_f32_to_bf16(v));
    }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm_test_epi8_mask(bytes, bytes);
    }
    FASTATTN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
    FASTATTN_INLINE void store(f16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    FASTATTN_INLINE void store(bf16_t* p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), avx512_f32_to_bf16(v));
    }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static FASTATTN_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) {
        const __m512i sign = _mm512_castps_si512(_mm512_set1_ps(-0.0f));  // a | (b & sign)
        return {_mm512_castsi512_ps(
            _mm512_ternarylogic_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v), sign, 0xf8))};
    }
    static FASTATTN_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
    // One instruction each: reduce gives 0 for infinities, and scalef takes the floor itself.
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        r = {_mm512_reduce_ps(x.v, 9)};
        return x;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) { return scale2(a, n); }
    // x = n + r with n a multiple of 1/width and r in [0, 1/width): returns 2^(n - floor(n)), from a table of
    // one register. -inf has r = 0, NaN has NaN.
    static FASTATTN_INLINE Vec split_fine(Vec x, Vec& r, Vec& n) {
        alignas(64) static constexpr float table[width] = {
            0x1.0p0f,      0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fe0p0f, 0x1.3dea64p0f,
            0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
            0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};
        r = {_mm512_reduce_ps(x.v, 0x49)};
        n = x - r;
        const Vec shifted = n + set1(0x1.8p19f);  // width * n in the lowest bits
        return {_mm512_permutexvar_ps(_mm512_castps_si512(shifted.v), _mm512_load_ps(table))};
    }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
    static FASTATTN_INLINE bool any(Mask m) { return m != 0; }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) {
        const __m512i idx = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        return {_mm512_permutex2var_ps(a.v, idx, b.v)};
    }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) {
        const __m512i idx = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        return {_mm512_permutex2var_ps(a.v, idx, b.v)};
    }
    // Shuffles within 128 bits, then of whole ones: these leave the FMA pipes alone, permutations of two do
    // not.
    static FASTATTN_INLINE Vec sum_each(const Vec (&r)[16]) {
        Vec pair[2], quad[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m512 a = r[4 * i + 2 * k].v, b = r[4 * i + 2 * k + 1].v;
                pair[k].v = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            }
            const __m512d a = _mm512_castps_pd(pair[0].v), b = _mm512_castps_pd(pair[1].v);
            quad[i].v = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        }
        const auto halves = [](__m512 a, __m512 b) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
        };
        return {halves(halves(quad[0].v, quad[1].v), halves(quad[2].v, quad[3].v))};
    }
    typedef std::uint32_t Words __attribute__((vector_size(64)));
    static FASTATTN_INLINE void mul_wide(Words a, std::uint32_t m, Words& hi, Words& lo) {
        const __m512i x = (__m512i)a, y = _mm512_set1_epi64(static_cast<std::int64_t>(m));
        const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
        hi = (Words)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
        lo = (Words)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    }
    static FASTATTN_INLINE float first(Vec a) { return _mm512_cvtss_f32(a.v); }
    static FASTATTN_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
    static FASTATTN_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
};

template <>
struct Vec<double, Avx512> {
    static constexpr int width = 8;
    static constexpr int registers = 32;
    using value_type = double;
    using Mask = __mmask8;
    __m512d v;

    static FASTATTN_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
    static FASTATTN_INLINE Vec set1(double x) { return {_mm512_set1_pd(x)}; }
    static FASTATTN_INLINE Vec iota() { return {_mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7)}; }
    static FASTATTN_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
    static FASTATTN_INLINE Mask lanes(int n) { return static_cast<Mask>((1u << n) - 1); }
    static FASTATTN_INLINE Vec load_part(const double* p, int n) {
        return {_mm512_maskz_loadu_pd(lanes(n), p)};
    }
    FASTATTN_INLINE void store_part(double* p, int n) const { _mm512_mask_storeu_pd(p, lanes(n), v); }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return static_cast<Mask>(_mm_test_epi8_mask(bytes, bytes));
    }
    FASTATTN_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_pd(a.v, b.v)}; }
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
    static FASTATTN_INLINE Vec abs(Vec a) { return {_mm512_abs_pd(a.v)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) {
        const __m512i sign = _mm512_castpd_si512(_mm512_set1_pd(-0.0));  // a | (b & sign)
        return {_mm512_castsi512_pd(
            _mm512_ternarylogic_epi64(_mm512_castpd_si512(a.v), _mm512_castpd_si512(b.v), sign, 0xf8))};
    }
    static FASTATTN_INLINE Vec round(Vec a) { return {_mm512_roundscale_pd(a.v, 8)}; }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) { return {_mm512_scalef_pd(a.v, n.v)}; }
    // One instruction each: reduce gives 0 for infinities, and scalef takes the floor itself.
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        r = {_mm512_reduce_pd(x.v, 9)};
        return x;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) { return scale2(a, n); }
    // x = n + r with n a multiple of 1/width and r in [0, 1/width): returns 2^(n - floor(n)), from a table of
    // one register. -inf has r = 0, NaN has NaN.
    static FASTATTN_INLINE Vec split_fine(Vec x, Vec& r, Vec& n) {
        alignas(64) static constexpr double table[width] = {0x1.0p0,
                                                            0x1.172b83c7d517bp0,
                                                            0x1.306fe0a31b715p0,
                                                            0x1.4bfdad5362a27p0,
                                                            0x1.6a09e667f3bcdp0,
                                                            0x1.8ace5422aa0dbp0,
                                                            0x1.ae89f995ad3adp0,
                                                            0x1.d5818dcfba487p0};
        r = {_mm512_reduce_pd(x.v, 0x39)};
        n = x - r;
        const Vec shifted = n + set1(0x1.8p49);  // width * n in the lowest bits
        return {_mm512_permutexvar_pd(_mm512_castpd_si512(shifted.v), _mm512_load_pd(table))};
    }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
    static FASTATTN_INLINE bool any(Mask m) { return m != 0; }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) {
        return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b.v)};
    }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) {
        return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b.v)};
    }
    static FASTATTN_INLINE double first(Vec a) { return _mm512_cvtsd_f64(a.v); }
    static FASTATTN_INLINE double reduce_max(Vec a) { return _mm512_reduce_max_pd(a.v); }
    static FASTATTN_INLINE double reduce_add(Vec a) { return _mm512_reduce_add_pd(a.v); }
};

}  // namespace
}  // namespace fastattn::cpu
