#include "core/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastattn {
namespace {

// The value of a finite pattern by definition: (-1)^s * m * 2^e.
double decode(std::uint16_t bits, int exponent_bits, int fraction_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
    const int significand = exponent == 0 ? fraction : fraction | (1 << fraction_bits);
    const double magnitude = std::ldexp(significand, (exponent == 0 ? 1 : exponent) - bias - fraction_bits);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

struct Format {
    const char* name;
    int exponent_bits, fraction_bits;
    float (*widen)(std::uint16_t);
    std::uint16_t (*from_f32)(float);
    std::uint16_t (*from_f64)(double);
    std::uint16_t infinity;
};

const Format kFormats[] = {
    {"float16", 5, 10, f16_to_f32, f32_to_f16, f64_to_f16, 0x7C00},
    {"bfloat16", 8, 7, bf16_to_f32, f32_to_bf16, f64_to_bf16, 0x7F80},
};

class Half : public ::testing::TestWithParam<Format> {};

TEST_P(Half, EveryPatternWidensExactlyAndComesBack) {
    const Format& format = GetParam();
    for (std::uint32_t n = 0; n < 65536; ++n) {
        const auto bits = static_cast<std::uint16_t>(n);
        const float wide = format.widen(bits);
        const std::uint16_t magnitude = bits & 0x7FFF;
        if (magnitude > format.infinity) {
            ASSERT_TRUE(std::isnan(wide)) << n;
            ASSERT_GT(format.from_f32(wide) & 0x7FFF, format.infinity) << n;
            ASSERT_GT(format.from_f64(wide) & 0x7FFF, format.infinity) << n;
            continue;
        }
        if (magnitude == format.infinity) {
            ASSERT_TRUE(std::isinf(wide));
        } else {
            ASSERT_EQ(static_cast<double>(wide), decode(bits, format.exponent_bits, format.fraction_bits))
                << n;
        }
        ASSERT_EQ(std::signbit(wide), (bits & 0x8000) != 0);
        ASSERT_EQ(format.from_f32(wide), bits);
        ASSERT_EQ(format.from_f64(wide), bits);
    }
}

// Between every two neighbours: just below the middle goes down, just above goes up, the middle to the
// even one. In double the steps are too small for float, so rounding twice would be seen.
TEST_P(Half, RoundsToNearestEven) {
    const Format& format = GetParam();
    for (std::uint32_t n = 0; n + 1 < format.infinity; ++n) {
        const auto low = static_cast<std::uint16_t>(n), high = static_cast<std::uint16_t>(n + 1);
        const std::uint16_t even = (low & 1) != 0 ? high : low;
        const double middle = (decode(low, format.exponent_bits, format.fraction_bits) +
                               decode(high, format.exponent_bits, format.fraction_bits)) /
                              2;
        for (const int sign : {0, 0x8000}) {
            const double x = sign != 0 ? -middle : middle;
            const double toward_zero = std::nextafter(x, 0.0), away = x * (1 + 1e-15);
            ASSERT_EQ(format.from_f64(x), even | sign) << n;
            ASSERT_EQ(format.from_f64(toward_zero), low | sign) << n;
            ASSERT_EQ(format.from_f64(away), high | sign) << n;
            const auto f = static_cast<float>(x);
            if (static_cast<double>(f) != x) continue;  // below the smallest float
            ASSERT_EQ(format.from_f32(f), even | sign) << n;
            ASSERT_EQ(format.from_f32(std::nextafter(f, 0.0f)), low | sign) << n;
            ASSERT_EQ(format.from_f32(std::nextafter(f, sign != 0 ? -INFINITY : INFINITY)), high | sign) << n;
        }
    }
}

TEST_P(Half, LargeValuesBecomeInfinityFromHalfAStepPastTheLargest) {
    const Format& format = GetParam();
    const auto last = static_cast<std::uint16_t>(format.infinity - 1);
    const double largest = decode(last, format.exponent_bits, format.fraction_bits);
    const double step =
        largest - decode(static_cast<std::uint16_t>(last - 1), format.exponent_bits, format.fraction_bits);
    const double middle = largest + step / 2;
    EXPECT_EQ(format.from_f64(middle), format.infinity);  // the tie: infinity's pattern is the even one
    EXPECT_EQ(format.from_f64(std::nextafter(middle, 0.0)), last);
    EXPECT_EQ(format.from_f32(static_cast<float>(middle)), format.infinity);
    EXPECT_EQ(format.from_f32(std::nextafter(static_cast<float>(middle), 0.0f)), last);
    EXPECT_EQ(format.from_f64(1e300), format.infinity);
    EXPECT_EQ(format.from_f64(-1e300), format.infinity | 0x8000);
    EXPECT_EQ(format.from_f32(std::numeric_limits<float>::max()), format.infinity);
}

TEST_P(Half, TinyValuesKeepTheirSign) {
    const Format& format = GetParam();
    EXPECT_EQ(format.from_f64(1e-300), 0);
    EXPECT_EQ(format.from_f64(-1e-300), 0x8000);
    EXPECT_EQ(format.from_f64(-0.0), 0x8000);
    EXPECT_EQ(format.from_f32(-0.0f), 0x8000);
    EXPECT_TRUE(std::isnan(format.widen(format.from_f64(std::nan("")))));
}

INSTANTIATE_TEST_SUITE_P(Formats, Half, ::testing::ValuesIn(kFormats),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace fastattn
