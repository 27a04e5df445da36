#include "cpu/flash_engine_bf16.h"
#include "simd_tests.h"

namespace fastattn::cpu {
namespace {

TEST(Engine, Bf16Pairs) { check_engine<Bf16DotEngine, bf16_t>(); }

TEST(Engine, WeightsRoundToNearestEven) {
    alignas(64) float row[16] = {};
    for (int i = 0; i < 16; ++i) {
        Bf16DotEngine::store_weights(Vec<float, Avx512>::set1(1.0f + static_cast<float>(i) / 256.0f), row, 0);
        bf16_t expected;
        from_scalar(1.0f + static_cast<float>(i) / 256.0f, &expected);
        EXPECT_EQ(Bf16DotEngine::weight(row, 3), to_scalar(expected));
    }
}

}  // namespace
}  // namespace fastattn::cpu
