// float16 and bfloat16 by integer arithmetic: round to nearest, ties to even; NaN stays NaN (made
// quiet), subnormals are kept. Nothing here depends on F16C, on FTZ/DAZ or on the compiler's flags.
// Internal linkage throughout: ISA objects include this file and must not share its code.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace fastattn {
namespace {

FASTATTN_HOST_DEVICE static inline std::uint32_t f32_bits(float x) noexcept {
    std::uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

FASTATTN_HOST_DEVICE static inline float f32_from_bits(std::uint32_t u) noexcept {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline float bf16_to_f32(std::uint16_t h) noexcept {
    return f32_from_bits(static_cast<std::uint32_t>(h) << 16);
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::uint16_t f32_to_bf16(float x) noexcept {
    const std::uint32_t u = f32_bits(x);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((u >> 16) | 0x0040u);
    return static_cast<std::uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline float f16_to_f32(std::uint16_t h) noexcept {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return f32_from_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    if (magnitude >= 0x0400u) return f32_from_bits(sign | ((magnitude << 13) + (112u << 23)));
    // Subnormal: magnitude * 2^-24 is a normal float, so the product is exact under FTZ too.
    const float x = static_cast<float>(magnitude) * 0x1p-24f;
    return f32_from_bits(sign | f32_bits(x));
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::uint16_t f32_to_f16(float x) noexcept {
    const std::uint32_t u = f32_bits(x);
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    const std::uint32_t a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u | ((a >> 13) & 0x3FFu));
    if (a >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // >= 65520 rounds to inf
    if (a >= 0x38800000u) {                                                  // normal: >= 2^-14
        const std::uint32_t rounded = a + 0xFFFu + ((a >> 13) & 1u);
        return static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
    }
    if (a < 0x33000000u) return static_cast<std::uint16_t>(sign);  // below 2^-25: zero
    // Subnormal: the significand, shifted so that one unit is 2^-24.
    const std::uint32_t significand = (a & 0x7FFFFFu) | 0x800000u;
    const std::uint32_t shift = 126u - (a >> 23);  // 14 .. 24
    const std::uint32_t kept = significand >> shift;
    const std::uint32_t rest = significand & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    const std::uint32_t up = (rest > half || (rest == half && (kept & 1u) != 0)) ? 1u : 0u;
    return static_cast<std::uint16_t>(sign | (kept + up));
}

// double to float, rounded to odd: a second rounding to a shorter type is then correct as one.
[[maybe_unused]] FASTATTN_HOST_DEVICE static inline float f64_to_f32_odd(double x) noexcept {
    const float y = static_cast<float>(x);
    const double back = static_cast<double>(y);
    if (back == x || x != x) return y;
    const bool away_from_zero = (x < 0 ? -back : back) > (x < 0 ? -x : x);
    const std::uint32_t toward_zero = f32_bits(y) - (away_from_zero ? 1u : 0u);
    return f32_from_bits(toward_zero | 1u);
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::uint16_t f64_to_f16(double x) noexcept {
    return f32_to_f16(f64_to_f32_odd(x));
}

[[maybe_unused]] FASTATTN_HOST_DEVICE static inline std::uint16_t f64_to_bf16(double x) noexcept {
    return f32_to_bf16(f64_to_f32_odd(x));
}

}  // namespace
}  // namespace fastattn
