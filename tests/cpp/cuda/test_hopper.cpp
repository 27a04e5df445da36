// What the kernel for Hopper stands on: how tiles lie in shared memory, in which order tiles of rows come,
// the exponential by a polynomial, and that the emulated instructions do what theirs are said to do.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "arrays.h"
#include "cuda/fused/rows.h"
#include "cuda/fused/sm90/hopper.h"
#include "cuda/fused/sm90/order.h"
#include "cuda/host/chunking.h"
#include "cuda/simt/runtime.h"
#include "emulator.h"

namespace fastattn::cuda {
namespace {

// ---- layout -----------------------------------------------------------------------------------------------

TEST(HopperLayout, EveryElementHasAPlaceOfItsOwnWithinTheTile) {
    for (const int rows : {64, 80, 128, 192}) {
        for (const int columns : {64, 128, 256}) {
            std::set<std::uint32_t> places;
            for (int row = 0; row < rows; ++row)
                for (int column = 0; column < columns; ++column)
                    places.insert(swizzled_128(tile_offset(rows, row, column)));
            EXPECT_EQ(places.size(), static_cast<std::size_t>(rows * columns));
            EXPECT_EQ(*places.begin(), 0u);
            EXPECT_EQ(*places.rbegin(), static_cast<std::uint32_t>(2 * rows * columns - 2));
        }
    }
}

// PTX ISA, 128-byte swizzle: of 1024 bytes as 8 rows of 8 pieces of 16, piece c of row r is at piece c xor r.
TEST(HopperLayout, PiecesOfAColumnLieInDifferentBanks) {
    for (int piece = 0; piece < 8; ++piece) {
        std::set<std::uint32_t> banks;
        for (int row = 0; row < 8; ++row) {
            const std::uint32_t place = swizzled_128(tile_offset(64, 8 + row, 8 * piece));
            EXPECT_EQ(place, static_cast<std::uint32_t>(1024 + 128 * row + 16 * (piece ^ row)));
            banks.insert(place % 128);
        }
        EXPECT_EQ(banks.size(), 8u);
    }
}

TEST(HopperLayout, DescriptorsHaveTheirFieldsWhereThePtxManualHasThem) {
    const std::uint64_t rows = descriptor_of_rows(0x12400, 128, 64, 80);
    EXPECT_EQ(rows & 0x3FFF,
              (0x12400u + 128 * 128 + 64 * 128 + 16 * 2) >> 4);  // second chunk, row 64, column 16 of it
    EXPECT_EQ(rows >> 32 & 0x3FFF, 1024u >> 4);  // from eight rows to the next
    EXPECT_EQ(rows >> 62, 1u);  // 128-byte swizzle
    EXPECT_EQ(rows >> 49 & 7, 0u);  // tiles begin at a multiple of 1024 bytes

    const std::uint64_t columns = descriptor_of_columns(0x400, 80, 32);
    EXPECT_EQ(columns & 0x3FFF, (0x400u + 32 * 128) >> 4);
    EXPECT_EQ(columns >> 16 & 0x3FFF, 80u * 128 >> 4);  // from 64 columns to the next
    EXPECT_EQ(columns >> 32 & 0x3FFF, 1024u >> 4);

    EXPECT_EQ(advanced(descriptor_of_rows(0x400, 80, 0, 0), tile_offset(80, 0, 112)),
              descriptor_of_rows(0x400, 80, 0, 112));
}

// ---- order ------------------------------------------------------------------------------------------------

TEST(FlashOrder, EveryTileComesOnceAndTheLongestOfASectionFirst) {
    for (const std::int64_t pairs : {1, 3, 8, 13}) {
        for (const std::int64_t row_tiles : {1, 2, 7}) {
            for (const std::int64_t section : {1, 3, 8, 100}) {
                const FlashOrder order{pairs, row_tiles, section};
                std::set<std::pair<std::int64_t, std::int64_t>> seen;
                std::int64_t last_section = 0, last_tile = row_tiles;
                for (std::int64_t n = 0; n < order.tiles(); ++n) {
                    const auto [pair, row_tile] = order.place(n);
                    ASSERT_TRUE(pair >= 0 && pair < pairs && row_tile >= 0 && row_tile < row_tiles);
                    seen.insert({pair, row_tile});
                    if (pair / section != last_section) {
                        EXPECT_EQ(pair / section, last_section + 1)
                            << "a section is done before the next begins";
                        last_section = pair / section;
                        last_tile = row_tiles;
                    }
                    EXPECT_LE(row_tile, last_tile);
                    last_tile = row_tile;
                }
                EXPECT_EQ(seen.size(), static_cast<std::size_t>(order.tiles()));
            }
        }
    }
}

TEST(FlashOrder, ASectionFillsHalfOfTheCache) {
    EXPECT_EQ(section_pairs(1 << 20, 50 << 20), 25);
    EXPECT_EQ(section_pairs(64 << 20, 50 << 20), 1) << "one at least";
    EXPECT_EQ(section_pairs(0, 50 << 20), 25 << 20) << "no keys";
}

// ---- the exponential --------------------------------------------------------------------------------------

TEST(PolynomialExponential, IsWithinItsErrorAndKeepsWhatIsSpecial) {
    float worst = 0;
    for (float x = -126.0f; x <= 9.0f; x += 0.000976f) {
        const double exact = std::exp2(static_cast<double>(x));
        worst = std::max(worst, static_cast<float>(std::abs(power2_by_polynomial(x) / exact - 1)));
    }
    EXPECT_LT(worst, 2.9e-6f);
    EXPECT_GT(worst, 1e-6f) << "it is the polynomial that was measured";
    constexpr float inf = std::numeric_limits<float>::infinity();
    EXPECT_EQ(power2_by_polynomial(-inf), 0.0f);
    EXPECT_EQ(power2_by_polynomial(-1e30f), 0.0f);
    EXPECT_TRUE(std::isnan(power2_by_polynomial(std::numeric_limits<float>::quiet_NaN())));
}

// ---- instructions -----------------------------------------------------------------------------------------

constexpr int kInner = 64, kColumns = 80,
              kOut = 128;  // a (64, kInner), b (kColumns, kInner), v (kColumns, kOut)

struct ProductArgs {
    TensorMap a, b, v;
    float *scores, *out;  // (64, kColumns), (64, kOut)
    bool waits;  // for the copies
};

struct Shared {
    std::uint16_t a[64 * kInner], b[kColumns * kInner], v[kColumns * kOut];
    Barrier barrier;
};

// scores = a b^T by one warp group, then out = (scores as f16) v.
void two_products(const ProductArgs& args) {
    alignas(1024) static Shared shared;
    begin_shared(&shared);
    if (threadIdx.x == 0) init_barrier(&shared.barrier, 1);
    publish_barriers();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrive_and_expect(&shared.barrier, sizeof shared.a + sizeof shared.b + sizeof shared.v);
        copy_box(shared.a, &args.a, 0, 0, 0, 0, &shared.barrier);
        copy_box(shared.b, &args.b, 0, 0, 0, 0, &shared.barrier);
        copy_box(shared.v, &args.v, 0, 0, 0, 0, &shared.barrier);
        copy_box(shared.v + kColumns * 64, &args.v, 64, 0, 0, 0, &shared.barrier);
    }
    if (args.waits) wait(&shared.barrier, 0);
    float s[kColumns / 8][4], o[kOut / 8][4] = {};
    begin_products();
    for (int k = 0; k < kInner; k += 16)
        multiply_rows<F16>(s, descriptor_of_rows(shared_address(shared.a), 64, 0, k),
                           descriptor_of_rows(shared_address(shared.b), kColumns, 0, k), k > 0);
    commit_products();
    wait_products<0>();
    std::uint32_t weights[kColumns / 16][4];
    for (int n = 0; n < kColumns / 16; ++n)
        for (int e = 0; e < 4; ++e)
            weights[n][e] = pack<F16>(s[2 * n + e / 2][2 * (e % 2)], s[2 * n + e / 2][2 * (e % 2) + 1]);
    begin_products();
    for (int k = 0; k < kColumns; k += 16)
        multiply_columns<F16>(o, weights[k / 16],
                              descriptor_of_columns(shared_address(shared.v), kColumns, k));
    commit_products();
    wait_products<0>();
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
    for (unsigned e = 0; e < 4; ++e) {
        const unsigned row = 16 * warp + g + 8 * (e / 2);
        for (unsigned j = 0; j < kColumns / 8; ++j)
            args.scores[row * kColumns + 8 * j + 2 * t + e % 2] = s[j][e];
        for (unsigned j = 0; j < kOut / 8; ++j) args.out[row * kOut + 8 * j + 2 * t + e % 2] = o[j][e];
    }
}

class Hopper : public ::testing::Test {
protected:
    void SetUp() override {
        emulator::reset();
        ASSERT_EQ(runtime::create_stream(&stream_), 0);
    }
    void TearDown() override { EXPECT_EQ(runtime::destroy_stream(stream_), 0); }

    // Small whole numbers, so that every sum is exact.
    static std::vector<std::uint16_t> matrix(int rows, int columns, int seed) {
        std::vector<std::uint16_t> x;
        for (int n = 0; n < rows * columns; ++n)
            x.push_back(f32_to_f16(static_cast<float>((n * 7 + seed) % 5 - 2)));
        return x;
    }
    static TensorMap map_of(std::vector<std::uint16_t>& x, int rows, int columns) {
        TileMapLayout layout;
        layout.data = x.data();
        layout.size[0] = static_cast<std::uint64_t>(columns);
        layout.size[1] = static_cast<std::uint64_t>(rows);
        layout.size[2] = layout.size[3] = 1;
        layout.stride[0] = static_cast<std::uint64_t>(2 * columns);
        layout.stride[1] = layout.stride[2] = 16;
        layout.rows = static_cast<std::uint32_t>(rows);
        TensorMap map{};
        EXPECT_EQ(runtime::encode_tile_map(layout, &map), 0);
        return map;
    }
    Stream stream_ = nullptr;
};

TEST_F(Hopper, ProductsOfCopiedTilesEqualTheDefinition) {
    auto a = matrix(64, kInner, 1), b = matrix(kColumns, kInner, 2), v = matrix(kColumns, kOut, 3);
    const auto at = [](const std::vector<std::uint16_t>& x, int columns, int row, int column) {
        return f16_to_f32(x[static_cast<std::size_t>(row * columns + column)]);
    };
    std::vector<float> scores(64 * kColumns), out(64 * kOut), want_scores = scores, want = out;
    for (int i = 0; i < 64; ++i) {
        for (int j = 0; j < kColumns; ++j) {
            float& sum = want_scores[static_cast<std::size_t>(i * kColumns + j)];
            for (int k = 0; k < kInner; ++k) sum += at(a, kInner, i, k) * at(b, kInner, j, k);
            for (int d = 0; d < kOut; ++d)
                want[static_cast<std::size_t>(i * kOut + d)] += sum * at(v, kOut, j, d);
        }
    }
    ProductArgs args{map_of(a, 64, kInner),
                     map_of(b, kColumns, kInner),
                     map_of(v, kColumns, kOut),
                     scores.data(),
                     out.data(),
                     true};
    for (const bool reversed : {false, true}) {
        emulator::set_threads_reversed(reversed);
        emulator::launch({}, kWarpGroup, stream_, [=] { two_products(args); });
        ASSERT_EQ(runtime::synchronize(stream_), 0);
        EXPECT_EQ(scores, want_scores);
        EXPECT_EQ(out, want);
        scores.assign(scores.size(), -1);
        out.assign(out.size(), -1);
    }
    // A copy that nobody waits for has not happened: the tiles are those of the run before.
    for (std::uint16_t& x : a) x = f32_to_f16(1.0f);
    args.waits = false;
    emulator::launch({}, kWarpGroup, stream_, [=] { two_products(args); });
    ASSERT_EQ(runtime::synchronize(stream_), 0);
    EXPECT_EQ(scores, want_scores);
}

TEST_F(Hopper, WhatTheDriverRefusesIsRefused) {
    auto x = matrix(8, 8, 0);
    TileMapLayout good;
    good.data = x.data();
    for (std::uint64_t& size : good.size) size = 8;
    for (std::uint64_t& stride : good.stride) stride = 16;
    good.rows = 8;
    TensorMap map;
    EXPECT_EQ(runtime::encode_tile_map(good, &map), 0);
    const auto refuses = [&](auto change) {
        TileMapLayout bad = good;
        change(bad);
        return runtime::encode_tile_map(bad, &map) != 0;
    };
    EXPECT_TRUE(refuses([&](TileMapLayout& l) { l.data = x.data() + 1; }));
    EXPECT_TRUE(refuses([](TileMapLayout& l) { l.size[2] = 0; }));
    EXPECT_TRUE(refuses([](TileMapLayout& l) { l.stride[1] = 8; }));
    EXPECT_TRUE(refuses([](TileMapLayout& l) { l.stride[2] = std::uint64_t{1} << 40; }));
    EXPECT_TRUE(refuses([](TileMapLayout& l) { l.rows = 257; }));
}

#if !defined(FASTATTN_EMULATOR_THREADS)  // threads wait for ever
using HopperDeathTest = Hopper;

TEST_F(HopperDeathTest, BarriersThatAreMisusedAreReported) {
    alignas(1024) static Barrier barrier;
    const auto run = [&](const std::function<void()>& body) {
        emulator::launch({}, 32, stream_, body);
        runtime::synchronize(stream_);
    };
    EXPECT_DEATH(run([] {
                     begin_shared(&barrier);
                     if (threadIdx.x == 0) init_barrier(&barrier, 2);
                     __syncthreads();
                     if (threadIdx.x == 0) arrive(&barrier);
                     wait(&barrier, 0);
                 }),
                 "deadlock.*\n.*threads 0..31: waiting for a barrier in shared memory");
    EXPECT_DEATH(run([] {
                     begin_shared(&barrier);
                     if (threadIdx.x == 0) {
                         init_barrier(&barrier, 1);
                         arrive_and_expect(&barrier, 16);
                         arrive(&barrier);
                     }
                 }),
                 "an arrival too many");
}
#endif

// ---- the keys of a block of rows --------------------------------------------------------------------------

// As keys_of() of the host, which describes no keys to the copy engine where there are none.
TEST(RowBlock, HasNoKeysWhereNoRowAttendsOne) {
    FlashArgs args;
    AttentionProblem& p = args.problem;
    p.batch = p.q_heads = p.kv_heads = 1, p.q_size = 70, p.kv_size = 33;
    p.window_left = p.window_right = 0, p.has_q_offset = true;
    for (const Index offset : {-80, -70, -69, 0, 30, 32, 33, 34, 40, 47}) {
        SCOPED_TRACE(offset);
        p.q_offset = offset;
        args.region = whole(p);
        const RowBlock block(args, 0, 0, 128);
        EXPECT_EQ(block.key_end - block.key_begin, args.region.keys);
        if (args.region.keys > 0) {
            EXPECT_EQ(block.key_begin, args.region.key);
        }
    }
}

// ---- which devices the fused kernels run on ---------------------------------------------------------------

TEST(ComputeCapability, IsAskedForAndSaid) {
    emulator::reset();
    emulator::set_compute_capability(1, 8, 6);  // before anybody asks: what is known of a device is kept
    testing::Array<std::uint16_t> in({1, 1, 1, 64}), out({1, 1, 1, 64});
    AttentionParams params;
    params.q = params.k = params.v = in.view(DType::f16);
    params.out = out.view(DType::f16);
    const AttentionProblem problem = make_problem(params);
    const auto message = [&](const char* kernel, const char* device) -> std::string {
        try {
            explain(problem, {.kernel = kernel, .device = device});
        } catch (const UnsupportedError& error) {
            return error.what();
        }
        return "";
    };
    EXPECT_EQ(message("cuda-flash-sm90", "cuda:0"), "");
    EXPECT_EQ(message("cuda-flash-sm80", "cuda:1"), "");
    EXPECT_EQ(message("cuda-decode", "cuda:1"), "");
    EXPECT_EQ(
        message("cuda-flash-sm90", "cuda:1"),
        "kernel: \"cuda-flash-sm90\" cannot compute this call: needs compute capability 9.0 and no other, "
        "emulated GPU (tests only) has 8.6");
    EXPECT_EQ(explain(problem, {.device = "cuda:1"}).kernel, "cuda-cublas");
}

}  // namespace
}  // namespace fastattn::cuda
