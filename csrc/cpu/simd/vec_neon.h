// Vec for AArch64 NEON: 4 floats or 2 doubles.
#pragma once

#include <arm_neon.h>

#include "cpu/simd/vec.h"

namespace fastattn::cpu {
namespace {

struct Neon {};

template <>
struct Vec<float, Neon> {
    static constexpr int width = 4;
    static constexpr int registers = 32;
    using value_type = float;
    using Mask = uint32x4_t;
    float32x4_t v;

    static FASTATTN_INLINE Vec zero() { return {vdupq_n_f32(0.0f)}; }
    static FASTATTN_INLINE Vec set1(float x) { return {vdupq_n_f32(x)}; }
    static FASTATTN_INLINE Vec iota() {
        const float lanes[4] = {0, 1, 2, 3};
        return {vld1q_f32(lanes)};
    }
    static FASTATTN_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
    static FASTATTN_INLINE Vec load(const f16_t* p) {
        return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))))};
    }
    static FASTATTN_INLINE Vec load(const bf16_t* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16))};
    }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        const std::uint32_t lanes[4] = {p[0], p[1], p[2], p[3]};
        return vtstq_u32(vld1q_u32(lanes), vdupq_n_u32(0xff));
    }
    FASTATTN_INLINE void store(float* p) const { vst1q_f32(p, v); }
    FASTATTN_INLINE void store(f16_t* p) const {
        vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
    }
    FASTATTN_INLINE void store(bf16_t* p) const {
        const uint32x4_t bits = vreinterpretq_u32_f32(v);
        const uint32x4_t high = vshrq_n_u32(bits, 16);
        const uint32x4_t bias = vaddq_u32(vandq_u32(high, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
        const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
        const uint32x4_t number = vceqq_f32(v, v);
        vst1_u16(reinterpret_cast<std::uint16_t*>(p), vmovn_u32(vbslq_u32(number, rounded, quiet)));
    }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
    static FASTATTN_INLINE Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) {
        return {vbslq_f32(vdupq_n_u32(0x80000000u), b.v, a.v)};
    }
    static FASTATTN_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) {
        const float32x4_t k = vminq_f32(vmaxq_f32(n.v, vdupq_n_f32(-127.0f)), vdupq_n_f32(127.0f));
        const int32x4_t e = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(k), vdupq_n_s32(127)), 23);
        return {vmulq_f32(a.v, vreinterpretq_f32_s32(e))};
    }
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        const Vec y = max(set1(-127.0f), x);
        const Vec n = {vrndmq_f32(y.v)};
        r = y - n;
        return n;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) { return scale2(a, n); }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return vcgtq_f32(a.v, b.v); }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return vceqq_f32(a.v, b.v); }
    static FASTATTN_INLINE bool any(Mask m) { return vmaxvq_u32(m) != 0; }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {vbslq_f32(m, a.v, b.v)}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) { return {vzip1q_f32(a.v, b.v)}; }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) { return {vzip2q_f32(a.v, b.v)}; }
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    static FASTATTN_INLINE void mul_wide(Words a, std::uint32_t m, Words& hi, Words& lo) {
        const uint32x4_t x = (uint32x4_t)a, y = vdupq_n_u32(m);
        const uint32x4_t low = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(y)));
        const uint32x4_t high = vreinterpretq_u32_u64(vmull_high_u32(x, y));
        hi = (Words)vuzp2q_u32(low, high);
        lo = (Words)vuzp1q_u32(low, high);
    }
    static FASTATTN_INLINE float first(Vec a) { return vgetq_lane_f32(a.v, 0); }
    static FASTATTN_INLINE float reduce_max(Vec a) { return vmaxnmvq_f32(a.v); }
    static FASTATTN_INLINE float reduce_add(Vec a) { return vaddvq_f32(a.v); }
};

template <>
struct Vec<double, Neon> {
    static constexpr int width = 2;
    static constexpr int registers = 32;
    using value_type = double;
    using Mask = uint64x2_t;
    float64x2_t v;

    static FASTATTN_INLINE Vec zero() { return {vdupq_n_f64(0.0)}; }
    static FASTATTN_INLINE Vec set1(double x) { return {vdupq_n_f64(x)}; }
    static FASTATTN_INLINE Vec iota() {
        const double lanes[2] = {0, 1};
        return {vld1q_f64(lanes)};
    }
    static FASTATTN_INLINE Vec load(const double* p) { return {vld1q_f64(p)}; }
    static FASTATTN_INLINE Mask mask_bytes(const std::uint8_t* p) {
        const std::uint64_t lanes[2] = {p[0], p[1]};
        return vtstq_u64(vld1q_u64(lanes), vdupq_n_u64(0xff));
    }
    FASTATTN_INLINE void store(double* p) const { vst1q_f64(p, v); }
    friend FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f64(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f64(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f64(a.v, b.v)}; }
    friend FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f64(a.v, b.v)}; }
    static FASTATTN_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
    static FASTATTN_INLINE Vec max(Vec a, Vec b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
    static FASTATTN_INLINE Vec min(Vec a, Vec b) { return {vbslq_f64(vcltq_f64(a.v, b.v), a.v, b.v)}; }
    static FASTATTN_INLINE Vec abs(Vec a) { return {vabsq_f64(a.v)}; }
    static FASTATTN_INLINE Vec copysign(Vec a, Vec b) {
        return {vbslq_f64(vdupq_n_u64(std::uint64_t{1} << 63), b.v, a.v)};
    }
    static FASTATTN_INLINE Vec round(Vec a) { return {vrndnq_f64(a.v)}; }
    static FASTATTN_INLINE Vec scale2(Vec a, Vec n) {
        const float64x2_t k = vminq_f64(vmaxq_f64(n.v, vdupq_n_f64(-1023.0)), vdupq_n_f64(1023.0));
        const int64x2_t e = vshlq_n_s64(vaddq_s64(vcvtq_s64_f64(k), vdupq_n_s64(1023)), 52);
        return {vmulq_f64(a.v, vreinterpretq_f64_s64(e))};
    }
    static FASTATTN_INLINE Vec split2(Vec x, Vec& r) {
        const Vec y = max(set1(-1023.0), x);
        const Vec n = {vrndmq_f64(y.v)};
        r = y - n;
        return n;
    }
    static FASTATTN_INLINE Vec shift2(Vec a, Vec n) { return scale2(a, n); }
    static FASTATTN_INLINE Mask gt(Vec a, Vec b) { return vcgtq_f64(a.v, b.v); }
    static FASTATTN_INLINE Mask eq(Vec a, Vec b) { return vceqq_f64(a.v, b.v); }
    static FASTATTN_INLINE bool any(Mask m) { return vmaxvq_u32(vreinterpretq_u32_u64(m)) != 0; }
    static FASTATTN_INLINE Vec select(Mask m, Vec a, Vec b) { return {vbslq_f64(m, a.v, b.v)}; }
    static FASTATTN_INLINE Vec interleave_lo(Vec a, Vec b) { return {vzip1q_f64(a.v, b.v)}; }
    static FASTATTN_INLINE Vec interleave_hi(Vec a, Vec b) { return {vzip2q_f64(a.v, b.v)}; }
    static FASTATTN_INLINE double first(Vec a) { return vgetq_lane_f64(a.v, 0); }
    static FASTATTN_INLINE double reduce_max(Vec a) { return vmaxnmvq_f64(a.v); }
    static FASTATTN_INLINE double reduce_add(Vec a) { return vaddvq_f64(a.v); }
};

}  // namespace
}  // namespace fastattn::cpu
