// The emulated GPU itself: what the tests of the CUDA room rely on.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "core/half.h"
#include "cuda/blas/abi.h"
#include "cuda/simt/runtime.h"
#include "cuda_shim.h"
#include "emulator.h"

namespace fastattn::cuda {
namespace {

class Emulator : public ::testing::Test {
protected:
    void SetUp() override {
        emulator::reset();
        ASSERT_EQ(runtime::create_pool(0, 0, &pool_), 0);
        ASSERT_EQ(runtime::create_stream(&stream_), 0);
    }
    void TearDown() override {
        EXPECT_EQ(runtime::destroy_stream(stream_), 0);
        EXPECT_EQ(emulator::live_streams(), 0u);
        emulator::synchronize_all();
        EXPECT_EQ(emulator::live_allocations(), 0u);
        EXPECT_EQ(emulator::live_events(), 0u);
        EXPECT_EQ(emulator::live_descriptors(), 0u);
    }
    Pool pool_ = nullptr;
    Stream stream_ = nullptr;
};

// ---- kernels ----------------------------------------------------------------------------------------------

struct SumArgs {
    const float* in;
    float* out;
    int n;
};

__global__ void __launch_bounds__(256) block_sum(SumArgs args) {
    __shared__ float partial[32];
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    float sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < args.n; i += static_cast<int>(blockDim.x)) {
        sum = __fadd_rn(sum, __ldg(args.in + blockIdx.x * static_cast<unsigned>(args.n) + i));
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
    __syncthreads();
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) sum += partial[i];
    if (threadIdx.x == 0) args.out[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

TEST_F(Emulator, BlocksReduceThroughShuffleSharedMemoryAndBarriers) {
    constexpr int kBlocks = 7, kValues = 1000;
    std::vector<float> in(kBlocks * kValues);
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 97);
    for (const bool reversed : {false, true}) {
        emulator::set_threads_reversed(reversed);
        for (const unsigned threads : {32u, 64u, 256u}) {
            std::vector<float> out(kBlocks * 6, -1);
            const SumArgs args{in.data(), out.data(), kValues};
            emulator::launch({kBlocks, 3, 2}, threads, stream_, [=] { block_sum(args); });
            EXPECT_EQ(out[0], -1) << "lazy";
            ASSERT_EQ(runtime::synchronize(stream_), 0);
            ASSERT_EQ(runtime::last_error(), 0);
            for (int i = 0; i < kBlocks * 6; ++i) {
                const auto first = in.begin() + i % kBlocks * kValues;
                EXPECT_EQ(out[static_cast<std::size_t>(i)], std::accumulate(first, first + kValues, 0.0f));
            }
        }
    }
}

TEST_F(Emulator, WarpFunctions) {
    constexpr unsigned kThreads = 80;  // the last warp is not full
    struct Results {
        unsigned ballot[kThreads];
        int any[kThreads], all[kThreads], from_three[kThreads], down[kThreads];
        double doubles[kThreads];
    };
    std::vector<Results> results(1);
    Results* const r = results.data();
    emulator::launch({}, kThreads, stream_, [r] {
        const unsigned t = threadIdx.x, full = 0xFFFFFFFFu;
        r->ballot[t] = __ballot_sync(full, t % 3 == 0);
        r->any[t] = __any_sync(full, t == 40);
        r->all[t] = __all_sync(full, t < 64);
        __syncwarp();
        r->from_three[t] = __shfl_sync(full, static_cast<int>(t), 3);
        r->down[t] = __shfl_down_sync(full, static_cast<int>(t), 4, 8);
        r->doubles[t] = __shfl_xor_sync(full, t + 0.5, 1);
    });
    ASSERT_EQ(runtime::synchronize(stream_), 0);
    for (unsigned t = 0; t < kThreads; ++t) {
        const unsigned first = t / 32 * 32;
        unsigned ballot = 0;
        for (unsigned i = first; i < std::min(first + 32, kThreads); ++i)
            ballot |= (i % 3 == 0 ? 1u : 0u) << (i - first);
        EXPECT_EQ(r->ballot[t], ballot);
        EXPECT_EQ(r->any[t], first == 32);
        EXPECT_EQ(r->all[t], t < 64);
        EXPECT_EQ(r->from_three[t], static_cast<int>(first + 3));
        EXPECT_EQ(r->down[t], static_cast<int>(t % 8 < 4 ? t + 4 : t));
        EXPECT_EQ(r->doubles[t], (t ^ 1u) + 0.5);
    }
}

TEST_F(Emulator, LaunchErrorsAreFoundByLastError) {
    emulator::launch({0, 1, 1}, 32, stream_, [] { FAIL(); });
    EXPECT_EQ(runtime::last_error(), 9);
    EXPECT_EQ(runtime::last_error(), 0);
    emulator::launch({}, 1025, stream_, [] { FAIL(); });
    EXPECT_EQ(runtime::last_error(), 9);
    emulator::fail_next("launch", 719);
    emulator::launch({}, 32, stream_, [] { FAIL(); });
    EXPECT_EQ(runtime::last_error(), 719);
    ASSERT_EQ(runtime::set_device(1), 0);
    emulator::launch({}, 32, stream_, [] { FAIL(); });
    EXPECT_EQ(runtime::last_error(), 400) << "the stream belongs to device 0";
    ASSERT_EQ(runtime::set_device(0), 0);
    EXPECT_EQ(emulator::pending(), 0u);
}

#if !defined(FASTATTN_EMULATOR_THREADS)  // threads hang instead
using EmulatorDeathTest = Emulator;

TEST_F(EmulatorDeathTest, DivergentBarriersAreReported) {
    const auto run = [&](unsigned threads, const std::function<void()>& body) {
        emulator::launch({}, threads, stream_, body);
        runtime::synchronize(stream_);
    };
    EXPECT_DEATH(run(64,
                     [] {
                         if (threadIdx.x < 60) __syncthreads();
                     }),
                 "deadlock.*\n.*threads 0..59: in __syncthreads\n.*threads 60..63: returned");
    EXPECT_DEATH(run(32,
                     [] {
                         if (threadIdx.x != 5) __syncwarp();
                     }),
                 "deadlock");
    EXPECT_DEATH(run(32,
                     [] {
                         if (threadIdx.x != 5) {
                             __syncwarp();
                         } else {
                             __any_sync(0xFFFFFFFFu, 1);
                         }
                     }),
                 "lanes of a warp diverge");
    EXPECT_DEATH(run(16, [] { __shfl_xor_sync(0xFFFFFFFFu, 1, 16); }), "takes no part");
}

TEST_F(EmulatorDeathTest, UnknownStreamsAreReported) {
    int x = 0;
    EXPECT_DEATH(runtime::copy(&x, &x, sizeof x, Copy::to_device, &x), "unknown stream");
}
#endif

// ---- memory and order -------------------------------------------------------------------------------------

TEST_F(Emulator, StreamsAreLazyAndEventsOrderThem) {
    Stream other = nullptr;
    Event event = nullptr;
    ASSERT_EQ(runtime::create_stream(&other), 0);
    ASSERT_EQ(runtime::create_event(&event), 0);
    ASSERT_EQ(runtime::wait(other, event), 0);  // never recorded: nothing to wait for

    int first = 1, a = 0, b = 0, c = 0, unrelated = 0;
    ASSERT_EQ(runtime::copy(&a, &first, sizeof a, Copy::to_device, stream_), 0);
    ASSERT_EQ(runtime::record(event, stream_), 0);
    ASSERT_EQ(runtime::copy(&unrelated, &first, sizeof a, Copy::to_device, stream_), 0);
    ASSERT_EQ(runtime::copy(&b, &a, sizeof a, Copy::to_device, other), 0);  // not ordered: reads the old a
    ASSERT_EQ(runtime::wait(other, event), 0);
    ASSERT_EQ(runtime::destroy_event(event), 0);  // those who wait still do
    ASSERT_EQ(runtime::copy(&c, &a, sizeof a, Copy::to_host, other), 0);
    EXPECT_EQ(a, 0);
    first = 2;  // the source of a copy is read when the copy runs

    ASSERT_EQ(runtime::synchronize(other), 0);
    EXPECT_EQ(a, 2);
    EXPECT_EQ(b, 0);
    EXPECT_EQ(c, 2);
    EXPECT_EQ(unrelated, 0) << "no more than the event demands";
    ASSERT_EQ(runtime::synchronize(stream_), 0);
    EXPECT_EQ(unrelated, 2);
    ASSERT_EQ(runtime::destroy_stream(other), 0);
}

TEST_F(Emulator, SynchronizeEventRunsUpToTheRecord) {
    Event event = nullptr;
    ASSERT_EQ(runtime::create_event(&event), 0);
    unsigned char before = 0, after = 0;
    Stream const legacy = nullptr;
    const char seven = 7;
    ASSERT_EQ(runtime::copy(&before, &seven, 1, Copy::to_device, legacy), 0);
    ASSERT_EQ(runtime::record(event, reinterpret_cast<Stream>(std::uintptr_t{1})), 0);  // the same stream
    ASSERT_EQ(runtime::copy(&after, &seven, 1, Copy::to_device, legacy), 0);
    ASSERT_EQ(runtime::query(event), 0);
    EXPECT_EQ(before, 7);
    EXPECT_EQ(after, 0);
    ASSERT_EQ(runtime::synchronize(legacy), 0);
    EXPECT_EQ(after, 7);
    ASSERT_EQ(runtime::destroy_event(event), 0);
}

TEST_F(Emulator, MemoryIsFreedWhenTheStreamGetsThere) {
    void* data = nullptr;
    ASSERT_EQ(runtime::allocate(&data, 64, pool_, stream_), 0);
    EXPECT_EQ(static_cast<unsigned char*>(data)[63], 0xFF);
    unsigned char seen[2] = {};
    char fives[64];
    std::fill(std::begin(fives), std::end(fives), char{5});
    ASSERT_EQ(runtime::copy(data, fives, 64, Copy::to_device, stream_), 0);
    ASSERT_EQ(runtime::copy(seen, data, 1, Copy::to_host, stream_), 0);
    ASSERT_EQ(runtime::release(data, stream_), 0);
    EXPECT_EQ(runtime::release(data, stream_), 1) << "twice";
    EXPECT_EQ(emulator::live_allocations(), 1u);
    ASSERT_EQ(runtime::synchronize(stream_), 0);
    EXPECT_EQ(seen[0], 5);
    EXPECT_EQ(emulator::live_allocations(), 0u);

    emulator::set_memory_limit(1000);
    ASSERT_EQ(runtime::allocate(&data, 600, pool_, stream_), 0);
    void* more = nullptr;
    EXPECT_EQ(runtime::allocate(&more, 401, pool_, stream_), kNoMemory);
    EXPECT_EQ(more, nullptr);
    ASSERT_EQ(runtime::release(data, stream_), 0);
    ASSERT_EQ(runtime::allocate(&more, 1000, pool_, stream_), 0) << "a stream has what it released";
    ASSERT_EQ(runtime::release(more, stream_), 0);

    ASSERT_EQ(runtime::allocate_pinned(&data, 10), 0);
    EXPECT_EQ(emulator::live_pinned(), 1u);
    ASSERT_EQ(runtime::release_pinned(data), 0);
    EXPECT_EQ(emulator::live_pinned(), 0u);
}

TEST_F(Emulator, FailuresComeWhenAskedFor) {
    int count = 0;
    emulator::fail_next("device_count", 999, 1);
    EXPECT_EQ(runtime::device_count(&count), 0);
    EXPECT_EQ(count, 2);
    EXPECT_EQ(runtime::device_count(&count), 999);
    EXPECT_EQ(runtime::device_count(&count), 0);
    EXPECT_EQ(emulator::calls("device_count"), 3u);
    emulator::fail_next("*", 700);
    EXPECT_EQ(runtime::synchronize(stream_), 700);
    emulator::set_device_count(0);
    EXPECT_EQ(runtime::device_count(&count), kNoDevice);
    emulator::set_driver_version(0);
    EXPECT_EQ(runtime::device_count(&count), kInsufficientDriver);
    emulator::set_device_count(1);
    emulator::set_driver_version(13000);
    EXPECT_EQ(runtime::set_device(1), 101);
    EXPECT_STREQ(runtime::error_name(kNoMemory), "cudaErrorMemoryAllocation");
    const char* why = nullptr;
    emulator::set_cublas_available(false);
    EXPECT_EQ(cublas::open(&why), nullptr);
    EXPECT_NE(why, nullptr);
}

TEST_F(Emulator, HostThreadsShareTheGpu) {
    constexpr int kThreads = 4, kLaunches = 20;
    std::vector<int> sums(kThreads, 0);
    std::vector<std::thread> team;
    for (int i = 0; i < kThreads; ++i) {
        team.emplace_back([out = &sums[static_cast<std::size_t>(i)]] {
            Stream const own = reinterpret_cast<Stream>(std::uintptr_t{2});
            for (int n = 0; n < kLaunches; ++n) {
                emulator::launch({2}, 32, own, [out] {
                    __shared__ int values[32];
                    values[threadIdx.x] = 1;
                    __syncthreads();
                    if (threadIdx.x == 0) *out += std::accumulate(values, values + 32, 0);
                    __syncthreads();
                    values[threadIdx.x] = 0;
                });
                if (n % 4 == 0) runtime::synchronize(own);
            }
            EXPECT_EQ(runtime::synchronize(own), 0);
        });
    }
    for (std::thread& thread : team) thread.join();
    EXPECT_EQ(sums, std::vector<int>(kThreads, kLaunches * 2 * 32));
}

// ---- products ---------------------------------------------------------------------------------------------

struct Gemm {
    cublas::DataType type, out;
    cublas::ComputeType compute;
    bool transpose_a, transpose_b, pointers;
    std::int64_t m, n, k;
    int batches;
};

double value_at(const std::vector<unsigned char>& data, std::int64_t index, cublas::DataType type) {
    const auto i = static_cast<std::size_t>(index);
    double d = 0;
    float f = 0;
    std::uint16_t h = 0;
    switch (type) {
        case cublas::kF64: std::memcpy(&d, &data[i * 8], 8); return d;
        case cublas::kF32: std::memcpy(&f, &data[i * 4], 4); return static_cast<double>(f);
        case cublas::kF16: std::memcpy(&h, &data[i * 2], 2); return static_cast<double>(f16_to_f32(h));
        case cublas::kBf16: std::memcpy(&h, &data[i * 2], 2); return static_cast<double>(bf16_to_f32(h));
    }
    return d;
}

void set_value(std::vector<unsigned char>& data, std::int64_t index, cublas::DataType type, int value) {
    const auto i = static_cast<std::size_t>(index);
    const auto f = static_cast<float>(value);
    const double d = value;
    const std::uint16_t h = type == cublas::kF16 ? f32_to_f16(f) : f32_to_bf16(f);
    switch (type) {
        case cublas::kF64: std::memcpy(&data[i * 8], &d, 8); break;
        case cublas::kF32: std::memcpy(&data[i * 4], &f, 4); break;
        default: std::memcpy(&data[i * 2], &h, 2);
    }
}

std::size_t size_of(cublas::DataType type) { return type == cublas::kF64 ? 8 : type == cublas::kF32 ? 4 : 2; }

struct Described {
    cublas::Handle handle = nullptr;
    cublas::Descriptor product = nullptr;
    cublas::Layout a = nullptr, b = nullptr, c = nullptr;
    cublas::Preference preference = nullptr;
};

// Small whole numbers: every product is exact, but for what rounds to the output.
void check_gemm(const Gemm& g, Stream stream) {
    using namespace cublas;
    const Table* const t = open(nullptr);
    ASSERT_NE(t, nullptr);
    const std::int64_t rows_a = g.transpose_a ? g.k : g.m, cols_a = g.transpose_a ? g.m : g.k;
    const std::int64_t rows_b = g.transpose_b ? g.n : g.k, cols_b = g.transpose_b ? g.k : g.n;
    const std::int64_t lda = rows_a + 3, ldb = rows_b + 1, ldc = g.m + 2;
    const std::int64_t stride_a = lda * cols_a + 5, stride_b = 0, stride_c = ldc * g.n + 1;
    const auto fill = [&](std::int64_t count, DataType type, int seed) {
        std::vector<unsigned char> data(static_cast<std::size_t>(count) * size_of(type));
        for (std::int64_t i = 0; i < count; ++i) {
            set_value(data, i, type, static_cast<int>((i * 7 + seed) % 11) - 5);
        }
        return data;
    };
    auto a = fill(stride_a * g.batches, g.type, 1);
    auto b = fill(ldb * cols_b, g.type, 4);
    auto c = fill(stride_c * g.batches, g.out, 2);
    const auto old = c;

    Described x;
    ASSERT_EQ(t->Create(&x.handle), kSuccess);
    ASSERT_EQ(t->MatmulDescCreate(&x.product, g.compute, g.type == kF64 ? kF64 : kF32), kSuccess);
    std::int32_t operation = g.transpose_a ? kTranspose : kNone;
    ASSERT_EQ(t->MatmulDescSetAttribute(x.product, kTransposeA, &operation, sizeof operation), kSuccess);
    operation = g.transpose_b ? kTranspose : kNone;
    ASSERT_EQ(t->MatmulDescSetAttribute(x.product, kTransposeB, &operation, sizeof operation), kSuccess);
    ASSERT_EQ(t->MatrixLayoutCreate(&x.a, g.type, static_cast<std::uint64_t>(rows_a),
                                    static_cast<std::uint64_t>(cols_a), lda),
              kSuccess);
    ASSERT_EQ(t->MatrixLayoutCreate(&x.b, g.type, static_cast<std::uint64_t>(rows_b),
                                    static_cast<std::uint64_t>(cols_b), ldb),
              kSuccess);
    ASSERT_EQ(t->MatrixLayoutCreate(&x.c, g.out, static_cast<std::uint64_t>(g.m),
                                    static_cast<std::uint64_t>(g.n), ldc),
              kSuccess);
    const std::uint32_t mode = g.pointers ? kPointerArray : kStrided;
    const std::int32_t batches = g.batches;
    for (const auto& [layout, stride] : {std::pair{x.a, stride_a}, {x.b, stride_b}, {x.c, stride_c}}) {
        ASSERT_EQ(t->MatrixLayoutSetAttribute(layout, kBatchCount, &batches, sizeof batches), kSuccess);
        ASSERT_EQ(t->MatrixLayoutSetAttribute(layout, kBatchStride, &stride, sizeof stride), kSuccess);
        ASSERT_EQ(t->MatrixLayoutSetAttribute(layout, kBatchMode, &mode, sizeof mode), kSuccess);
        ASSERT_EQ(t->MatrixLayoutSetAttribute(layout, kBatchMode, &mode, 8), kInvalidValue);
    }
    ASSERT_EQ(t->MatmulPreferenceCreate(&x.preference), kSuccess);
    const auto alignment = static_cast<std::uint32_t>(std::min<std::size_t>(size_of(g.type), size_of(g.out)));
    for (const auto which : {kMinAlignmentA, kMinAlignmentB, kMinAlignmentC, kMinAlignmentD}) {
        ASSERT_EQ(t->MatmulPreferenceSetAttribute(x.preference, which, &alignment, sizeof alignment),
                  kSuccess);
    }
    const std::uint64_t most = 4096;
    ASSERT_EQ(t->MatmulPreferenceSetAttribute(x.preference, kMaxWorkspaceBytes, &most, sizeof most),
              kSuccess);

    HeuristicResult found;
    int count = 0;
    ASSERT_EQ(
        t->MatmulAlgoGetHeuristic(x.handle, x.product, x.a, x.b, x.c, x.c, x.preference, 1, &found, &count),
        kSuccess);
    ASSERT_EQ(count, 1);
    ASSERT_LE(found.workspace_bytes, most);

    std::vector<void*> pa, pb, pc;
    for (int e = 0; e < g.batches; ++e) {
        pa.push_back(a.data() + static_cast<std::size_t>(e * stride_a) * size_of(g.type));
        pb.push_back(b.data());
        pc.push_back(c.data() + static_cast<std::size_t>(e * stride_c) * size_of(g.out));
    }
    alignas(16) unsigned char workspace[4096];
    const float factors_f32[] = {2, -1};
    const double factors_f64[] = {2, -1};
    const void* const alpha = g.type == kF64 ? static_cast<const void*>(factors_f64) : factors_f32;
    const void* const beta = g.type == kF64 ? static_cast<const void*>(factors_f64 + 1) : factors_f32 + 1;
    void* const da = g.pointers ? static_cast<void*>(pa.data()) : a.data();
    void* const db = g.pointers ? static_cast<void*>(pb.data()) : b.data();
    void* const dc = g.pointers ? static_cast<void*>(pc.data()) : c.data();
    const auto call = [&](void* first, std::size_t workspace_bytes) {
        return t->Matmul(x.handle, x.product, alpha, first, x.a, db, x.b, beta, dc, x.c, dc, x.c,
                         &found.algorithm, workspace, workspace_bytes, stream);
    };
    EXPECT_EQ(call(da, found.workspace_bytes - 1), kInvalidValue);
    EXPECT_EQ(call(static_cast<char*>(da) + 1, found.workspace_bytes), kInvalidValue) << "alignment";
    ASSERT_EQ(call(da, found.workspace_bytes), kSuccess);
    EXPECT_EQ(c, old) << "lazy";
    for (const auto layout : {x.a, x.b, x.c}) EXPECT_EQ(t->MatrixLayoutDestroy(layout), kSuccess);
    EXPECT_EQ(t->MatrixLayoutDestroy(x.a), kInvalidValue);
    EXPECT_EQ(t->MatmulDescDestroy(x.product), kSuccess);
    EXPECT_EQ(t->MatmulPreferenceDestroy(x.preference), kSuccess);

    const auto log = emulator::take_matmuls();
    ASSERT_EQ(log.size(), 1u);
    EXPECT_EQ(log[0].m, g.m);
    EXPECT_EQ(log[0].n, g.n);
    EXPECT_EQ(log[0].k, g.k);
    EXPECT_EQ(log[0].transpose_a, g.transpose_a);
    EXPECT_EQ(log[0].pointer_array, g.pointers);
    EXPECT_EQ(emulator::heuristic_calls(), 1u);

    ASSERT_EQ(runtime::synchronize(stream), 0);
    auto expected = old;
    for (std::int64_t e = 0; e < g.batches; ++e) {
        for (std::int64_t i = 0; i < g.m; ++i) {
            for (std::int64_t j = 0; j < g.n; ++j) {
                double sum = 0;
                for (std::int64_t l = 0; l < g.k; ++l) {
                    const std::int64_t in_a = e * stride_a + (g.transpose_a ? i * lda + l : l * lda + i);
                    const std::int64_t in_b = g.transpose_b ? l * ldb + j : j * ldb + l;
                    sum += value_at(a, in_a, g.type) * value_at(b, in_b, g.type);
                }
                const std::int64_t at = e * stride_c + j * ldc + i;
                set_value(expected, at, g.out, static_cast<int>(2 * sum - value_at(old, at, g.out)));
            }
        }
    }
    EXPECT_EQ(c, expected) << "and nothing between the columns is touched";
}

TEST_F(Emulator, ProductsEqualTheDefinition) {
    using namespace cublas;
    const struct {
        DataType type, out;
        ComputeType compute;
    } kinds[] = {{kF16, kF16, kCompute32F}, {kF16, kF32, kCompute32F},  {kBf16, kBf16, kCompute32F},
                 {kF32, kF32, kCompute32F}, {kBf16, kF32, kCompute32F}, {kF32, kF32, kCompute32FFastTf32},
                 {kF64, kF64, kCompute64F}};
    const std::int64_t sizes[][3] = {{1, 9, 5}, {13, 6, 17}, {33, 40, 8}};
    for (const auto& kind : kinds) {
        for (const auto& [m, n, k] : sizes) {
            for (int bits = 0; bits < 8; ++bits) {
                SCOPED_TRACE(::testing::Message() << "type " << kind.type << " -> " << kind.out << ", " << m
                                                  << 'x' << n << 'x' << k << ", transposes " << bits);
                emulator::reset();
                const bool ta = (bits & 1) != 0, tb = (bits & 2) != 0, pointers = (bits & 4) != 0;
                check_gemm({kind.type, kind.out, kind.compute, ta, tb, pointers, m, n, k, 3}, stream_);
                if (HasFailure()) return;
            }
        }
    }
}

TEST_F(Emulator, HeuristicRefusesWhatDoesNotFit) {
    using namespace cublas;
    const Table* const t = open(nullptr);
    Described x;
    ASSERT_EQ(t->Create(&x.handle), kSuccess);
    ASSERT_EQ(t->MatmulDescCreate(&x.product, kCompute32F, kF32), kSuccess);
    ASSERT_EQ(t->MatrixLayoutCreate(&x.a, kF32, 4, 3, 4), kSuccess);
    ASSERT_EQ(t->MatrixLayoutCreate(&x.b, kF32, 3, 5, 3), kSuccess);
    ASSERT_EQ(t->MatrixLayoutCreate(&x.c, kF32, 4, 5, 4), kSuccess);
    ASSERT_EQ(t->MatmulPreferenceCreate(&x.preference), kSuccess);
    HeuristicResult found;
    int count = 0;
    const auto ask = [&](Layout a, Layout b) {
        return t->MatmulAlgoGetHeuristic(x.handle, x.product, a, b, x.c, x.c, x.preference, 1, &found,
                                         &count);
    };
    EXPECT_EQ(ask(x.a, x.b), kSuccess);
    EXPECT_EQ(found.workspace_bytes, 0u) << "no workspace was offered";
    EXPECT_EQ(ask(x.b, x.a), kInvalidValue);
    const std::uint32_t mode = kPointerArray;
    for (Layout layout : {x.a, x.b}) {
        ASSERT_EQ(t->MatrixLayoutSetAttribute(layout, kBatchMode, &mode, sizeof mode), kSuccess);
    }
    EXPECT_EQ(ask(x.a, x.b), kInvalidValue) << "one mode for all";
    ASSERT_EQ(t->MatrixLayoutSetAttribute(x.c, kBatchMode, &mode, sizeof mode), kSuccess);
    EXPECT_EQ(ask(x.a, x.b), kSuccess);
    emulator::set_pointer_arrays_supported(false);
    EXPECT_EQ(ask(x.a, x.b), cublas::kNotSupported);
    Layout half = nullptr;
    ASSERT_EQ(t->MatrixLayoutCreate(&half, kF16, 4, 3, 4), kSuccess);
    ASSERT_EQ(t->MatrixLayoutSetAttribute(half, kBatchMode, &mode, sizeof mode), kSuccess);
    EXPECT_EQ(ask(half, x.b), cublas::kNotSupported);
    for (Layout layout : {x.a, x.b, x.c, half}) EXPECT_EQ(t->MatrixLayoutDestroy(layout), kSuccess);
    EXPECT_EQ(t->MatmulDescDestroy(x.product), kSuccess);
    EXPECT_EQ(t->MatmulPreferenceDestroy(x.preference), kSuccess);
}

}  // namespace
}  // namespace fastattn::cuda
