// The engine of AVX512_BF16: a unit is a pair of bf16, vdpbf16ps sums two products into f32.
#pragma once

#include "cpu/flash/engine.h"
#include "cpu/simd/vec_avx512.h"

namespace fastattn::cpu {
namespace {

struct Bf16DotEngine {
    using V = Vec<float, Avx512>;
    using Acc = float;
    using Unit = float;  // the bits of two bf16, the lower index in the lower half; never used as a number
    static constexpr int mr = 6;
    static constexpr int nv = 4;
    static constexpr int nr = nv * V::width;
    static constexpr int scalars = 2;
    static constexpr Accuracy accuracy = Accuracy::bf16;
    // Two sums of a row's weights: as computed, for lse; and as rounded to bf16, for out, so that the
    // weights that v is multiplied with add up to 1 and one key alone gives its value exactly.
    static constexpr int sums = 2;

    static FASTATTN_INLINE V mma(V a, V b, V acc) {
        return {
            _mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
    }
    static FASTATTN_INLINE void store_weights(V a, V b, Unit* row, std::int64_t column) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(b.v, a.v);
        std::memcpy(reinterpret_cast<bf16_t*>(row) + column, &pairs, sizeof pairs);
    }
    static FASTATTN_INLINE void add_weights(const V (&p)[nv], Acc* sum) {
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        __m512 rounded = V::load(sum + V::width).v;
#pragma GCC unroll 8
        for (int n = 0; n < nv; n += 2)
            rounded = _mm512_dpbf16_ps(rounded, _mm512_cvtne2ps_pbh(p[n + 1].v, p[n].v), ones);
        V{rounded}.store(sum + V::width);
        (V::load(sum) + sum_of(p)).store(sum);
    }
    static FASTATTN_INLINE float weight(const Unit* row, std::int64_t column) {
        bf16_t x;
        std::memcpy(&x, reinterpret_cast<const char*>(row) + column * 2, 2);
        return to_scalar(x);
    }
    static FASTATTN_INLINE void set_weight(Unit* row, std::int64_t column, float p) {
        bf16_t x;
        from_scalar(p, &x);
        std::memcpy(reinterpret_cast<char*>(row) + column * 2, &x, 2);
    }
    static FASTATTN_INLINE V combine(const V (&rows)[scalars]) {
        const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(rows[0].v), 16);
        return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(rows[1].v)))};
    }
    static FASTATTN_INLINE V combine_rounded(const V (&rows)[scalars]) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows[0].v));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows[1].v));
        return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
    }
    // 32 columns of two rows, as two vectors of units; their products need restore_columns() at the end.
    static FASTATTN_INLINE void pair_rows(const bf16_t* a, const bf16_t* b, V& first, V& second) {
        const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
        first.v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(x, y));
        second.v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(x, y));
    }
    // Unpacking is within 128 bits: `first` has the lower four columns of each eight.
    static std::int64_t paired_column(std::int64_t c) { return c / 8 * 4 + c % 4 + (c % 8 < 4 ? 0 : 16); }
    static FASTATTN_INLINE void restore_columns(V& first, V& second) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        const __m512 a = first.v, b = second.v;
        first.v = _mm512_permutex2var_ps(a, low, b);
        second.v = _mm512_permutex2var_ps(a, high, b);
    }
    static FASTATTN_INLINE float scalar_of(const Unit* unit, std::int64_t k) { return weight(unit, k); }
    static FASTATTN_INLINE V load_whole(const bf16_t* row, std::int64_t u) {
        return {_mm512_loadu_ps(reinterpret_cast<const float*>(row + 2 * u))};
    }
    static FASTATTN_INLINE V load_units(const bf16_t* row, std::int64_t stride, std::int64_t u,
                                        std::int64_t n) {
        const std::int64_t first = 2 * u, left = n - first;
        if (stride == 1) {
            if (left >= 2 * V::width) return load_whole(row, u);
            const auto rest = static_cast<__mmask32>(left > 0 ? (1u << left) - 1 : 0);
            return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(rest, row + first))};
        }
        alignas(64) bf16_t buffer[2 * V::width] = {};
        for (std::int64_t i = 0; i < left && i < 2 * V::width; ++i) buffer[i] = row[(first + i) * stride];
        return {_mm512_load_ps(reinterpret_cast<const float*>(buffer))};
    }
};

}  // namespace
}  // namespace fastattn::cpu
