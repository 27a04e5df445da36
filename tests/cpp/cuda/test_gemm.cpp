// Batches of products: which calls they become (pure functions), and what the calls compute on the emulated
// GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "core/half.h"
#include "cuda/blas/gemm.h"
#include "cuda/cublas/products.h"
#include "emulator.h"

namespace fastattn::cuda {
namespace {

using testing::message_of;

using Axes = std::array<Index, kBatchAxes>;

Gemm batch_of(Axes count, Axes a, Axes b, Axes c) {
    Gemm g;
    g.count = count;
    g.a.stride = a, g.b.stride = b, g.c.stride = c;
    return g;
}

// ---- pure functions ---------------------------------------------------------------------------------
TEST(MergeAxes, NeighboursThatContinueEachOtherBecomeOne) {
    const Gemm g = merge_axes(batch_of({2, 3, 4}, {12, 4, 1}, {120, 40, 10}, {24, 8, 2}));
    EXPECT_EQ(g.count, (Axes{1, 1, 24}));
    EXPECT_EQ(g.a.stride[2], 1);
    EXPECT_EQ(g.b.stride[2], 10);
    EXPECT_EQ(g.c.stride[2], 2);
}

TEST(MergeAxes, OneOperandThatDoesNotContinueIsEnoughToKeepThem) {
    const Gemm g = merge_axes(batch_of({2, 1, 4}, {4, 0, 1}, {4, 0, 1}, {5, 0, 1}));
    EXPECT_EQ(strided_calls(g), 2);
    EXPECT_EQ(g.count[2], 4);
    EXPECT_EQ(g.c.stride[2], 1);
}

TEST(MergeAxes, TheLongestAxisComesLast) {
    const Gemm g = merge_axes(batch_of({9, 2, 3}, {1000, 100, 1}, {1000, 100, 1}, {1000, 100, 1}));
    EXPECT_EQ(g.count[2], 9);
    EXPECT_EQ(g.a.stride[2], 1000);
    EXPECT_EQ(strided_calls(g), 6);
}

TEST(MergeAxes, AxesOfOneEntryVanishWhateverTheirStride) {
    const Gemm g = merge_axes(batch_of({1, 5, 1}, {7, 3, 9}, {8, 3, 1}, {0, 3, 2}));
    EXPECT_EQ(g.count, (Axes{1, 1, 5}));
    EXPECT_EQ(g.b.stride[2], 3);
}

TEST(MergeAxes, ProductsStayTheSame) {
    const auto entries = [](const Gemm& g) {
        std::vector<std::tuple<Index, Index, Index>> all;
        for (Index i = 0; i < g.count[0]; ++i)
            for (Index j = 0; j < g.count[1]; ++j)
                for (Index k = 0; k < g.count[2]; ++k) {
                    const auto at = [&](const GemmOperand& x) {
                        return i * x.stride[0] + j * x.stride[1] + k * x.stride[2];
                    };
                    all.emplace_back(at(g.a), at(g.b), at(g.c));
                }
        std::sort(all.begin(), all.end());
        return all;
    };
    std::mt19937 rng(1);
    int merged = 0;
    for (int round = 0; round < 2000; ++round) {
        const auto below = [&](Index n) { return static_cast<Index>(rng() % static_cast<std::uint64_t>(n)); };
        Gemm g;
        for (Index& n : g.count) n = 1 + below(4);
        for (GemmOperand* x : {&g.a, &g.b, &g.c}) {
            x->stride[2] = below(5) - 2;
            for (const int axis : {1, 0})  // mostly in step with the next axis
                x->stride[axis] = below(5) == 0 ? below(40) - 20 : g.count[axis + 1] * x->stride[axis + 1];
        }
        const Gemm m = merge_axes(g);
        EXPECT_EQ(entries(m), entries(g)) << round;
        EXPECT_EQ(m.count[2], *std::max_element(m.count.begin(), m.count.end()));
        EXPECT_LE(strided_calls(m), strided_calls(g));
        merged += m.count[2] == g.entries() && g.entries() > 16;
    }
    EXPECT_GT(merged, 100);
}

TEST(Key, SaysWhatAnAlgorithmDependsOn) {
    alignas(256) static std::byte memory[512];
    Gemm g = batch_of({1, 2, 3}, {0, 64, 128}, {0, 64, 128}, {0, 64, 128});
    g.a.data = g.b.data = g.c.data = memory;
    g.m = 3, g.n = 4, g.k = 5;
    g.a.ld = 6, g.b.ld = 7, g.c.ld = 8;
    const auto changed = [&](bool pointers, auto change) {
        Gemm other = g;
        change(other);
        return !(key_of(other, pointers) == key_of(g, pointers));
    };
    for (const bool pointers : {false, true}) {
        EXPECT_TRUE(changed(pointers, [](Gemm& x) { x.m = 9; }));
        EXPECT_TRUE(changed(pointers, [](Gemm& x) { x.n = 9; }));
        EXPECT_TRUE(changed(pointers, [](Gemm& x) { x.k = 9; }));
        EXPECT_TRUE(changed(pointers, [](Gemm& x) { x.transpose_a = true; }));
        EXPECT_TRUE(changed(pointers, [](Gemm& x) { x.compute = cublas::kCompute32FFastTf32; }));
        for (const auto side : {&Gemm::a, &Gemm::b, &Gemm::c}) {
            EXPECT_TRUE(changed(pointers, [&](Gemm& x) { (x.*side).ld = 9; }));
            EXPECT_TRUE(changed(pointers, [&](Gemm& x) { (x.*side).type = cublas::kF16; }));
            // Neither the address nor the stride of the other calls, while the alignment is the same.
            EXPECT_FALSE(changed(pointers, [&](Gemm& x) { (x.*side).data = memory + 256; }));
            EXPECT_FALSE(changed(pointers, [&](Gemm& x) { (x.*side).stride[1] = 192; }));
            EXPECT_TRUE(changed(pointers, [&](Gemm& x) { (x.*side).data = memory + 4; }));
        }
        EXPECT_TRUE(changed(pointers, [](Gemm& x) { x.count[2] = 7; }));
    }
    EXPECT_FALSE(key_of(g, true) == key_of(g, false));
    EXPECT_TRUE(changed(false, [](Gemm& x) { x.b.stride[2] = 192; }));
    EXPECT_FALSE(changed(true, [](Gemm& x) { x.b.stride[2] = 192; }));
    EXPECT_EQ(key_of(g, true).batch, 6);
    EXPECT_EQ(key_of(g, false).batch, 3);
}

TEST(Key, AlignmentOfEveryMatrix) {
    alignas(256) static std::byte memory[512];
    const auto alignment = [](std::size_t offset, Axes count, Axes stride, cublas::DataType type) {
        Gemm g = batch_of(count, stride, {}, {});
        g.a.data = memory + offset;
        g.a.type = type;
        return key_of(g, true).alignment[0];
    };
    EXPECT_EQ(alignment(0, {1, 1, 1}, {}, cublas::kF32), 16u);
    EXPECT_EQ(alignment(40, {1, 1, 1}, {}, cublas::kF32), 8u);
    EXPECT_EQ(alignment(0, {1, 1, 5}, {1, 1, 3}, cublas::kF32), 4u);
    EXPECT_EQ(alignment(0, {1, 1, 1}, {1, 1, 3}, cublas::kF32), 16u);  // nobody goes there
    EXPECT_EQ(alignment(0, {2, 1, 5}, {8, 1, 64}, cublas::kF16), 16u);
    EXPECT_EQ(alignment(0, {2, 1, 5}, {-4, 1, 64}, cublas::kF64), 16u);
    EXPECT_EQ(alignment(0, {1, 4, 1}, {0, 0, 0}, cublas::kF64), 16u);  // broadcast
}

// ---- products ---------------------------------------------------------------------------------------
// The library of the emulated GPU, with an ear for what preferences are set.
struct Preference {
    cublas::PreferenceAttribute attribute;
    std::uint64_t value;
};
std::vector<Preference> preferences;
const cublas::Table* library;

cublas::Status heard(cublas::Preference preference, cublas::PreferenceAttribute attribute, const void* value,
                     std::size_t bytes) {
    std::uint64_t number = 0;
    std::memcpy(&number, value, bytes);
    preferences.push_back({attribute, number});
    return library->MatmulPreferenceSetAttribute(preference, attribute, value, bytes);
}

constexpr std::size_t kWorkspaceBytes = 4096;

class Products : public ::testing::Test {
protected:
    void SetUp() override {
        emulator::reset();
        const char* why = nullptr;
        library = cublas::open(&why);
        ASSERT_NE(library, nullptr) << why;
        table = *library;
        table.MatmulPreferenceSetAttribute = heard;
        preferences.clear();
        ASSERT_EQ(table.Create(&handle), 0);
        ASSERT_EQ(runtime::create_stream(&stream), 0);
        plans = std::make_unique<GemmPlans>(table, handle, kWorkspaceBytes);
    }
    void TearDown() override {
        plans.reset();
        EXPECT_EQ(runtime::destroy_stream(stream), 0);
    }

    void run(const Gemm& gemm, bool pointers = true) {
        plans->run(gemm, {stream, workspace, pointers ? addresses : nullptr});
        EXPECT_EQ(runtime::synchronize(stream), 0);
    }

    cublas::Table table{};
    cublas::Handle handle = nullptr;
    Stream stream = nullptr;
    std::unique_ptr<GemmPlans> plans;
    alignas(256) std::byte workspace[kWorkspaceBytes];
    void* addresses[600];
};

// A batch on arrays of its own: matrices of `a` are (m, k) or (k, m), those of `b` (k, n) or (n, k), with
// gaps between columns and matrices.
template <class T>
struct Batch {
    std::vector<T> a, b, c;
    Gemm gemm;

    static constexpr cublas::DataType kType = std::is_same_v<T, double> ? cublas::kF64 : cublas::kF32;

    Batch(Index m, Index n, Index k, bool transpose_a, Axes count, unsigned seed, Index gap = 1,
          bool transpose_b = false) {
        gemm.m = m, gemm.n = n, gemm.k = k;
        gemm.transpose_a = transpose_a;
        gemm.transpose_b = transpose_b;
        gemm.compute = kType == cublas::kF64 ? cublas::kCompute64F : cublas::kCompute32F;
        gemm.count = count;
        std::mt19937 rng(seed);
        std::normal_distribution<double> normal;
        const auto make = [&](std::vector<T>& data, GemmOperand& x, Index rows, Index columns) {
            x.type = kType;
            x.ld = rows + 2;
            x.stride[2] = x.ld * columns + gap;
            x.stride[1] = x.stride[2] * count[2] + gap;
            x.stride[0] = x.stride[1] * count[1] + gap;
            data.resize(static_cast<std::size_t>(x.stride[0] * count[0]));
            for (T& value : data) value = static_cast<T>(normal(rng));
            x.data = data.data();
        };
        make(a, gemm.a, transpose_a ? k : m, transpose_a ? m : k);
        make(b, gemm.b, transpose_b ? n : k, transpose_b ? k : n);
        make(c, gemm.c, m, n);
    }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    // What c must be afterwards, gaps included.
    std::vector<T> expected() const {
        std::vector<T> out = c;
        const Gemm& g = gemm;
        for (Index i = 0; i < g.count[0]; ++i)
            for (Index j = 0; j < g.count[1]; ++j)
                for (Index e = 0; e < g.count[2]; ++e) {
                    const auto at = [&](const GemmOperand& x) {
                        return i * x.stride[0] + j * x.stride[1] + e * x.stride[2];
                    };
                    for (Index row = 0; row < g.m; ++row)
                        for (Index column = 0; column < g.n; ++column) {
                            double sum = 0;
                            for (Index t = 0; t < g.k; ++t) {
                                const Index of_a = g.transpose_a ? row * g.a.ld + t : t * g.a.ld + row;
                                const Index of_b = g.transpose_b ? t * g.b.ld + column : column * g.b.ld + t;
                                sum += static_cast<double>(a[static_cast<std::size_t>(at(g.a) + of_a)]) *
                                       static_cast<double>(b[static_cast<std::size_t>(at(g.b) + of_b)]);
                            }
                            T& to = out[static_cast<std::size_t>(at(g.c) + column * g.c.ld + row)];
                            to = static_cast<T>(g.factor * sum +
                                                (g.accumulate ? static_cast<double>(to) : 0.0));
                        }
                }
        return out;
    }
};

template <class T>
::testing::AssertionResult near(const std::vector<T>& got, const std::vector<T>& expected) {
    for (std::size_t n = 0; n < got.size(); ++n)
        if (!(std::abs(got[n] - expected[n]) <= T(1e-4)))
            return ::testing::AssertionFailure()
                   << "element " << n << " is " << got[n] << ", not " << expected[n];
    return ::testing::AssertionSuccess();
}

struct How {
    Axes count;
    bool pointers;
    std::size_t calls;
    bool by_pointers;
    int batch;
};

TEST_F(Products, OneCallSeveralCallsOrPointers) {
    const How cases[] = {
        {{1, 1, 1}, true, 1, false, 1},
        {{1, 1, 7}, true, 1, false, 7},
        {{4, 1, 6}, true, 4, false, 6},
        {{2, 3, 5}, true, 1, true, 30},
        {{2, 3, 5}, false, 6, false, 5},
        {{6, 3, 2}, false, 6, false, 6},  // the longest axis goes into the calls
    };
    for (const bool transpose : {false, true}) {
        unsigned seed = 0;
        for (const How& how : cases) {
            SCOPED_TRACE(::testing::Message() << "case " << seed << (transpose ? ", transposed" : ""));
            Batch<float> batch(5, 6, 7, transpose, how.count, ++seed);
            Batch<double> in_double(3, 2, 9, transpose, how.count, seed);
            const std::vector<float> expected = batch.expected();
            const std::vector<double> expected_double = in_double.expected();
            run(batch.gemm, how.pointers);
            EXPECT_TRUE(near(batch.c, expected));
            const auto made = emulator::take_matmuls();
            ASSERT_EQ(made.size(), how.calls);
            for (const auto& call : made) {
                EXPECT_EQ(call.pointer_array, how.by_pointers);
                EXPECT_EQ(call.batches, how.batch);
                EXPECT_EQ(call.alpha, 1.0f);
                EXPECT_EQ(call.beta, 0.0f);
                EXPECT_LE(call.workspace_bytes, kWorkspaceBytes);
                EXPECT_EQ(call.stream, stream);
            }
            run(in_double.gemm, how.pointers);
            EXPECT_TRUE(near(in_double.c, expected_double));
            EXPECT_EQ(emulator::take_matmuls().front().compute, cublas::kCompute64F);
        }
    }
}

TEST_F(Products, TransposedAndAdded) {
    for (const bool transpose_a : {false, true}) {
        for (const bool accumulate : {false, true}) {
            for (const Axes count : {Axes{1, 1, 7}, Axes{3, 3, 2}}) {
                const auto test = [&](auto type) {
                    Batch<decltype(type)> batch(5, 6, 7, transpose_a, count, 1, 1, true);
                    batch.gemm.accumulate = accumulate;
                    batch.gemm.factor = 0.5;
                    const auto expected = batch.expected();
                    run(batch.gemm);
                    EXPECT_TRUE(near(batch.c, expected));
                    for (const auto& call : emulator::take_matmuls()) {
                        EXPECT_TRUE(call.transpose_b);
                        EXPECT_EQ(call.beta, accumulate ? 1.0f : 0.0f);
                    }
                };
                test(1.0f);
                test(1.0);
            }
        }
    }
}

TEST_F(Products, BroadcastMatrices) {
    Batch<float> batch(4, 4, 4, true, {3, 2, 3}, 1);
    batch.gemm.a.stride = {batch.gemm.a.stride[0], batch.gemm.a.stride[1], 0};  // k shared by a group's heads
    batch.gemm.b.stride[0] = 0;
    const std::vector<float> expected = batch.expected(), before = batch.c;
    for (const bool pointers : {true, false}) {
        batch.c = before;
        batch.gemm.c.data = batch.c.data();
        run(batch.gemm, pointers);
        EXPECT_TRUE(near(batch.c, expected));
    }
}

TEST_F(Products, PointerArraysThatAreRefusedFallBackToCalls) {
    emulator::set_pointer_arrays_supported(false);
    Batch<float> batch(5, 6, 7, true, {3, 3, 2}, 1);
    const std::vector<float> expected = batch.expected();
    run(batch.gemm);
    EXPECT_TRUE(near(batch.c, expected));
    EXPECT_EQ(emulator::take_matmuls().size(), 6u);
    const std::size_t asked = emulator::heuristic_calls();
    run(batch.gemm);  // the refusal is remembered
    EXPECT_EQ(emulator::heuristic_calls(), asked);
}

TEST_F(Products, AlgorithmIsAskedForOnce) {
    Batch<float> first(5, 6, 7, true, {1, 1, 3}, 1), same(5, 6, 7, true, {1, 1, 3}, 2),
        other(5, 6, 8, true, {1, 1, 3}, 3);
    const std::vector<float> expected = same.expected();
    run(first.gemm);
    EXPECT_EQ(emulator::heuristic_calls(), 1u);
    run(same.gemm);
    EXPECT_EQ(emulator::heuristic_calls(), 1u);
    EXPECT_TRUE(near(same.c, expected));
    run(other.gemm);
    EXPECT_EQ(emulator::heuristic_calls(), 2u);
}

TEST_F(Products, PreferencesOfAnAlgorithm) {
    alignas(256) static float a[64], b[64], c[64];
    Gemm g;
    g.m = g.n = g.k = 4;
    g.a = {a, cublas::kF32, 4, {}}, g.b = {b + 1, cublas::kF32, 4, {}}, g.c = {c + 2, cublas::kF32, 4, {}};
    run(g);
    const auto value = [](cublas::PreferenceAttribute attribute) -> std::uint64_t {
        for (const Preference& p : preferences)
            if (p.attribute == attribute) return p.value;
        return ~std::uint64_t{0};
    };
    EXPECT_EQ(value(cublas::kMaxWorkspaceBytes), kWorkspaceBytes);
    EXPECT_EQ(value(cublas::kReductionSchemeMask),
              cublas::kReductionComputeType);  // never rounded in between
    EXPECT_EQ(value(cublas::kMinAlignmentA), 16u);
    EXPECT_EQ(value(cublas::kMinAlignmentB), 4u);
    EXPECT_EQ(value(cublas::kMinAlignmentC), 8u);
    EXPECT_EQ(value(cublas::kMinAlignmentD), 8u);
}

TEST_F(Products, NoAlgorithmIsAnErrorThatNamesTheProduct) {
    for (const int status : {cublas::kNotSupported, cublas::kInvalidValue}) {
        Batch<float> batch(status, 6, 7, true, {1, 1, 3}, 1);
        emulator::fail_next("MatmulAlgoGetHeuristic", status);
        EXPECT_EQ(message_of<CudaError>([&] { run(batch.gemm); }),
                  "cuBLAS: no algorithm for a product of m=" + std::to_string(status) +
                      ", n=6, k=7 on this device");
    }
    EXPECT_TRUE(emulator::take_matmuls().empty());
}

TEST_F(Products, FailuresOfTheLibraryLeaveNothingBehind) {
    const std::size_t before = emulator::live_descriptors();
    const std::pair<const char*, std::size_t> functions[] = {
        {"MatmulDescCreate", 1},         {"MatmulDescSetAttribute", 1}, {"MatrixLayoutCreate", 3},
        {"MatrixLayoutSetAttribute", 6}, {"MatmulPreferenceCreate", 1}, {"MatmulPreferenceSetAttribute", 6},
        {"MatmulAlgoGetHeuristic", 1}};
    Batch<float> batch(5, 6, 7, true, {1, 1, 3}, 1);
    const std::vector<float> expected = batch.expected();
    for (const auto& [function, times] : functions) {
        for (std::size_t n = 0; n < times; ++n) {
            SCOPED_TRACE(::testing::Message() << function << " " << n);
            emulator::fail_next(function, 14, n);
            const std::string message = message_of<CudaError>([&] { run(batch.gemm); });
            EXPECT_NE(message.find("CUBLAS_STATUS_INTERNAL_ERROR"), std::string::npos) << message;
            emulator::fail_next(function, cublas::kAllocFailed, n);
            EXPECT_NE(message_of<CudaError>([&] { run(batch.gemm); }).find("CUBLAS_STATUS_ALLOC_FAILED"),
                      std::string::npos);
            EXPECT_EQ(emulator::live_descriptors(), before);
        }
    }
    run(batch.gemm);  // no failure was kept
    EXPECT_TRUE(near(batch.c, expected));
    emulator::fail_next("Matmul", 13);
    EXPECT_EQ(message_of<CudaError>([&] { run(batch.gemm); }),
              "cuBLAS: a product failed: CUBLAS_STATUS_EXECUTION_FAILED");
}

TEST_F(Products, FailedLaunchOfThePointers) {
    Batch<float> batch(5, 6, 7, true, {3, 3, 2}, 1);
    emulator::fail_next("launch", 9);
    const std::string message = message_of<CudaError>([&] { run(batch.gemm); });
    EXPECT_NE(message.find("launching fill_pointers failed: cudaErrorInvalidConfiguration"),
              std::string::npos)
        << message;
    EXPECT_TRUE(emulator::take_matmuls().empty());
}

TEST_F(Products, DescriptorsLiveAsLongAsThePlans) {
    const std::size_t before = emulator::live_descriptors();
    Batch<float> batch(5, 6, 7, true, {1, 1, 3}, 1), other(5, 6, 8, false, {3, 3, 2}, 2);
    run(batch.gemm);
    run(batch.gemm);
    EXPECT_EQ(emulator::live_descriptors(), before + 4);  // a product and three layouts
    run(other.gemm);
    EXPECT_EQ(emulator::live_descriptors(), before + 8);
    plans.reset();
    EXPECT_EQ(emulator::live_descriptors(), before);
}

TEST_F(Products, ThreadsAtOnce) {
    std::vector<std::thread> threads;
    std::vector<int> wrong(4, -1);
    for (unsigned t = 0; t < wrong.size(); ++t) {
        threads.emplace_back([&, t] {
            Stream own = nullptr;
            runtime::create_stream(&own);
            std::vector<std::byte> scratch(kWorkspaceBytes + 256);
            auto* const aligned = reinterpret_cast<std::byte*>(
                (reinterpret_cast<std::uintptr_t>(scratch.data()) + 255) / 256 * 256);
            void* pointers[3 * 18];
            int bad = 0;
            for (unsigned round = 0; round < 40; ++round) {
                const Index size = 2 + (t + round) % 10;  // the others ask for the same ones meanwhile
                Batch<float> batch(size, 4, 3, true, round % 2 == 0 ? Axes{1, 1, 3} : Axes{3, 3, 2},
                                   t * 100 + round);
                const std::vector<float> expected = batch.expected();
                plans->run(batch.gemm, {own, aligned, pointers});
                runtime::synchronize(own);
                bad += !near(batch.c, expected);
            }
            runtime::destroy_stream(own);
            wrong[t] = bad;
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

// ---- the products of attention ------------------------------------------------------------------------
struct Types {
    DType dtype;
    bool tf32;
    cublas::ComputeType compute;
    cublas::DataType operand, scores;
};

TEST(AttentionProducts, ComputeInFloatOrDouble) {
    const Types cases[] = {
        {DType::f64, false, cublas::kCompute64F, cublas::kF64, cublas::kF64},
        {DType::f64, true, cublas::kCompute64F, cublas::kF64, cublas::kF64},
        {DType::f32, false, cublas::kCompute32F, cublas::kF32, cublas::kF32},
        {DType::f32, true, cublas::kCompute32FFastTf32, cublas::kF32, cublas::kF32},
        {DType::f16, false, cublas::kCompute32F, cublas::kF16, cublas::kF32},
        {DType::f16, true, cublas::kCompute32F, cublas::kF16, cublas::kF32},
        {DType::bf16, true, cublas::kCompute32F, cublas::kBf16, cublas::kF32},
    };
    for (const Types& t : cases) {
        AttentionProblem p;
        p.dtype = t.dtype;
        p.batch = 2, p.kv_heads = 3, p.group = 2, p.q_heads = 6, p.q_size = 10, p.kv_size = 40;
        p.head_dim = 16, p.value_dim = 24;
        p.q = {nullptr, 960, 96, 16, 1}, p.out = {nullptr, 1440, 144, 24, 1};
        p.k = {nullptr, 1920, 48, 16, 1}, p.v = {nullptr, 2880, 72, 24, 1};
        const Chunk chunk{1, 1, 1, 2, 4, 3, 8, 20};
        const Gemm s = scores_product(p, chunk, Fold::none, nullptr, 24, t.tf32);
        const Gemm o = values_product(p, chunk, Fold::none, nullptr, 24, t.tf32);
        EXPECT_EQ(s.compute, t.compute);
        EXPECT_EQ(o.compute, t.compute);
        EXPECT_EQ(s.a.type, t.operand);
        EXPECT_EQ(s.b.type, t.operand);
        EXPECT_EQ(s.c.type, t.scores);
        EXPECT_EQ(o.a.type, t.operand);
        EXPECT_EQ(o.b.type, t.operand);
        EXPECT_EQ(o.c.type, t.operand);
        EXPECT_EQ(std::tuple(s.m, s.n, s.k), std::tuple(20, 3, 16));
        EXPECT_EQ(std::tuple(o.m, o.n, o.k), std::tuple(24, 3, 20));
        EXPECT_EQ(s.count, (Axes{1, 2, 2}));
        const auto item = static_cast<Index>(item_size(t.dtype));
        const auto offset = [&](const GemmOperand& x) {
            return static_cast<Index>(reinterpret_cast<std::uintptr_t>(x.data)) / item;
        };
        EXPECT_EQ(offset(s.a), 1920 + 8 * 48 + 16);
        EXPECT_EQ(offset(s.b), 960 + 4 * 96 + 2 * 16);
        EXPECT_EQ(offset(o.a), 2880 + 8 * 72 + 24);
        EXPECT_EQ(offset(o.c), 1440 + 4 * 144 + 2 * 24);
        // Rows of 16-bit weights begin where their scores of 32 bits did.
        EXPECT_EQ(s.c.ld * static_cast<Index>(t.scores == cublas::kF64 ? 8 : 4), o.b.ld * item);
        EXPECT_EQ(o.b.stride[1] * item, s.c.stride[1] * (t.scores == cublas::kF64 ? 8 : 4));
    }
}

TEST(AttentionProducts, FoldedGroupsAreRowsOfOneProduct) {
    AttentionProblem p;
    p.batch = 2, p.kv_heads = 1, p.group = 4, p.q_heads = 4, p.q_size = 10, p.kv_size = 40;
    p.head_dim = p.value_dim = 16;
    p.q = p.out = {nullptr, 640, 64, 16, 1};
    p.k = p.v = {nullptr, 640, 16, 640, 1};
    const Chunk chunk{0, 2, 0, 1, 0, 5, 0, 40};
    const Gemm inner = scores_product(p, chunk, Fold::inner, nullptr, 40, false);
    EXPECT_EQ(inner.n, 20);
    EXPECT_EQ(inner.b.ld, 16);  // neighbours are heads
    EXPECT_EQ(inner.count, (Axes{2, 1, 1}));
    p.q = p.out = {nullptr, 640, 16, 80, 1};
    const Gemm outer = scores_product(p, chunk, Fold::outer, nullptr, 40, false);
    EXPECT_EQ(outer.n, 20);
    EXPECT_EQ(outer.b.ld, 16);  // neighbours are positions
    EXPECT_EQ(outer.count, (Axes{2, 1, 1}));
}

}  // namespace
}  // namespace fastattn::cuda
