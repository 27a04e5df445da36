// The kernel for few query rows: how keys are cut into pieces (pure functions, no GPU), what memory that
// takes, and its threads in another order. Numbers are the Python tests' matter, tests/test_cuda_decode.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "core/half.h"
#include "core/kernel.h"
#include "cuda/fused/decode/arguments.h"
#include "cuda/fused/decode/host.h"
#include "emulator.h"

namespace fastattn::cuda {
namespace {

using testing::Array;

AttentionProblem problem(Index batch, Index kv_heads, Index group, Index q_size, Index kv_size) {
    AttentionProblem p;
    p.dtype = DType::f16;
    p.batch = batch, p.kv_heads = kv_heads, p.group = group, p.q_heads = kv_heads * group;
    p.q_size = q_size, p.kv_size = kv_size, p.head_dim = p.value_dim = 128;
    return p;
}

Index pieces(Index rows, Index keys) { return (keys + piece_keys(rows, keys) - 1) / piece_keys(rows, keys); }

TEST(Pieces, ReachTheWholeMachineWithOneEntryOfEightHeads) {
    constexpr Index sms = 132;
    EXPECT_GE(8 * pieces(8, 1024), sms - 4);
    EXPECT_GE(8 * pieces(8, 4096), sms - 4);
    EXPECT_GE(8 * pieces(8, 32768), 3 * sms);
    EXPECT_GE(8 * pieces(8, 131072), 3 * sms);
}

TEST(Pieces, AreLargeBesideWhatMergingThemReadsAndWrites) {
    for (const Index rows : {1, 8, 16, 64, 512}) {
        for (const Index keys : {0, 1, 1000, 4096, 100000, 1 << 24}) {
            EXPECT_GE(piece_keys(rows, keys), 8 * rows);
            EXPECT_LE(pieces(rows, keys), 64);
        }
    }
    EXPECT_EQ(piece_keys(8, 4096), 256);
    EXPECT_EQ(piece_keys(8, 32768), 512);
    EXPECT_EQ(piece_keys(8, 131072), 2048);
}

TEST(Pieces, BeginWhereTheFirstWarpDoes) {
    for (Index rows = 1; rows < 300; rows += 7) {
        for (Index keys = 0; keys < 50000; keys += 97)
            ASSERT_EQ(piece_keys(rows, keys) % kDecodeStep, 0) << rows << " rows, " << keys << " keys";
    }
}

TEST(Pieces, AreThoseOfOneHeadWhateverElseThereIs) {
    const AttentionProblem one = problem(1, 1, 8, 2, 5000), many = problem(64, 16, 8, 2, 5000);
    const Pieces of_one = pieces_of(one, whole(one)), of_many = pieces_of(many, whole(many));
    EXPECT_EQ(of_one.size, of_many.size);
    EXPECT_EQ(of_one.count, of_many.count);
}

TEST(Pieces, HoldAllKeysOfARegionAndNoPieceIsInVain) {
    const AttentionProblem p = problem(2, 2, 4, 1, 3000);
    for (Index key = 0; key < 3000; key += 8) {
        for (Index keys = 1; key + keys <= 3000; keys += 131) {
            const Pieces found = pieces_of(p, {0, 2, 0, 2, 0, 1, key, keys});
            ASSERT_LE(found.first * found.size, key);
            ASSERT_GT((found.first + 1) * found.size, key);
            ASSERT_GE((found.first + found.count) * found.size, key + keys);
            ASSERT_LT((found.first + found.count - 1) * found.size, key + keys);
        }
    }
    EXPECT_EQ(pieces_of(p, {0, 2, 0, 2, 0, 1, 0, 0}).count, 1);  // writes the zeros
}

// ---- on the emulated GPU ----------------------------------------------------------------------------------
TEST(Decode, MemoryIsThatOfThePartialSums) {
    emulator::reset();
    static std::uint16_t something[8];
    const auto bytes = [&](Index keys) {
        AttentionProblem p = problem(3, 2, 4, 1, keys);
        for (Operand* x : {&p.q, &p.k, &p.v, &p.out}) *x = {something, 1 << 20, 128, 1 << 10, 1};
        return FlashDecode(context(0)).workspace_bytes(p, p, whole(p));
    };
    EXPECT_EQ(bytes(64), 0u);
    const std::size_t parts = 3 * 2 * 4 * 16;
    EXPECT_GE(bytes(1024), parts * (128 + 2) * 4);
    EXPECT_LE(bytes(1024), parts * (128 + 2) * 4 + 3 * 255);
}

struct HalfCall {
    Array<std::uint16_t> q, k, v, out;
    Array<float> lse;
    AttentionParams params;

    HalfCall(Index Sq, Index Sk, Index D)
        : q(random({2, Sq, 4, D}, 1)),
          k(random({2, Sk, 2, D}, 2)),
          v(random({2, Sk, 2, D}, 3)),
          out({2, Sq, 4, D}),
          lse({2, 4, Sq}) {
        params.q = q.view(DType::f16), params.k = k.view(DType::f16), params.v = v.view(DType::f16);
        params.out = out.view(DType::f16), params.lse = lse.view();
        for (TensorView* view : {&params.q, &params.k, &params.v, &params.out, &params.lse})
            view->device = {DeviceType::cuda, 0};
    }

    static Array<std::uint16_t> random(testing::Shape shape, unsigned seed) {
        const Array<float> from = testing::random_array<float>(shape, seed);
        Array<std::uint16_t> to(std::move(shape));
        for (std::size_t n = 0; n < to.data.size(); ++n) to[n] = f32_to_f16(from.data[n]);
        return to;
    }

    void run(const std::string& kernel, bool reversed) {
        std::fill(out.data.begin(), out.data.end(), std::uint16_t{0x7E00});
        std::fill(lse.data.begin(), lse.data.end(), -7.0f);
        emulator::set_threads_reversed(reversed);
        RunOptions options;
        options.kernel = kernel;
        attention_forward(make_problem(params), options);
        emulator::synchronize_all();
        emulator::set_threads_reversed(false);
    }
};

// Each of its kernels fails to start once: the call says which, and keeps no memory.
TEST(Decode, SaysWhichKernelDidNotStart) {
    for (const auto& [number, name] : {std::pair<std::size_t, std::string>{0, "decode_forward"},
                                       {1, "merge_splits"},
                                       {2, "recompute_rows"}}) {
        emulator::reset();
        HalfCall call(2, 1100, 64);
        call.params.causal = true;
        emulator::fail_next("launch", 700, number);
        const std::string message = testing::message_of<CudaError>([&] { call.run("cuda-decode", false); });
        EXPECT_NE(message.find("launching " + name), std::string::npos) << message;
        emulator::reset();
        EXPECT_EQ(emulator::live_allocations(), 0u);
    }
}

// Results do not depend on which thread of a block comes first. (Missing barriers are for the thread
// sanitizer to find, for which a thread of the machine is a thread of the block: minutes for each head
// dimension.)
TEST(Fused, SameBitsInEveryOrderOfThreads) {
    emulator::reset();
#if defined(FASTATTN_EMULATOR_THREADS)
    const std::vector<Index> dims{64};
#else
    const std::vector<Index> dims{64, 96, 128, 192, 256};
#endif
    for (const std::string kernel : {"cuda-decode", "cuda-flash-sm80", "cuda-flash-sm90"}) {
        for (const Index D : dims) {
            for (const Index Sk : {60, 300}) {
                for (const bool plain : {true, false}) {
                    HalfCall call(9, Sk, D);
                    call.params.causal = true;
                    if (!plain) call.params.softcap = 3.0;
                    call.run(kernel, false);
                    const std::vector<std::uint16_t> out = call.out.data;
                    const std::vector<float> lse = call.lse.data;
                    ASSERT_EQ(std::count(lse.begin(), lse.end(), -7.0f), 0);  // all written
                    call.run(kernel, true);
                    EXPECT_EQ(call.out.data, out) << kernel << ", D " << D << ", Sk " << Sk;
                    EXPECT_EQ(call.lse.data, lse) << kernel << ", D " << D << ", Sk " << Sk;
                }
            }
        }
    }
}

}  // namespace
}  // namespace fastattn::cuda
