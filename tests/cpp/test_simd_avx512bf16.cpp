#include "cpu/flash/engine_bf16.h"
#include "simd_tests.h"

namespace fastattn::cpu {
namespace {

TEST(Engine, Bf16Pairs) { check_engine<Bf16DotEngine, bf16_t>(); }

// Weights are stored rounded to nearest even; those of a panel are summed as they are and as they were
// rounded.
TEST(Engine, WeightsRoundToNearestEven) {
    using V = Vec<float, Avx512>;
    for (int i = 0; i < 16; ++i) {
        const float x = 1.0f + static_cast<float>(i) / 256.0f, y = x + 2.0f;
        alignas(64) float row[16] = {}, sums[32] = {};
        Bf16DotEngine::store_weights(V::set1(x), V::set1(y), row, 0);
        bf16_t rounded_x, rounded_y;
        from_scalar(x, &rounded_x);
        from_scalar(y, &rounded_y);
        EXPECT_EQ(Bf16DotEngine::weight(row, 3), to_scalar(rounded_x));
        EXPECT_EQ(Bf16DotEngine::weight(row, 19), to_scalar(rounded_y));
        const V panel[4] = {V::set1(x), V::set1(y), V::set1(x), V::set1(y)};
        Bf16DotEngine::add_weights(panel, sums);
        EXPECT_EQ(V::reduce_add(V::load(sums)), 32 * (x + y));
        EXPECT_EQ(V::reduce_add(V::load(sums + 16)), 32 * (to_scalar(rounded_x) + to_scalar(rounded_y)));
    }
}

}  // namespace
}  // namespace fastattn::cpu
