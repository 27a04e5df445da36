// What dispatch says about CUDA: why there is none, which device and kernel a call gets. What is probed once
// per process is tested in processes of their own, the DISABLED_ tests here.
#include "cuda/host/context.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>

#include "arrays.h"
#include "child_process.h"
#include "core/cuda_room.h"
#include "core/device_choice.h"
#include "core/environment.h"
#include "core/kernel.h"
#include "cuda/blas/library.h"
#include "emulator.h"

namespace fastattn {
namespace {

using testing::Array;
using testing::Call;
using testing::message_of;
using testing::random_array;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

RunOptions on(std::string_view device, std::string_view kernel = {}) {
    RunOptions options;
    options.device = device;
    options.kernel = kernel;
    return options;
}

AttentionParams on_device(AttentionParams p, int index = 0) {
    for (TensorView* view : {&p.q, &p.k, &p.v, &p.out}) view->device = {DeviceType::cuda, index};
    return p;
}

// The one CUDA kernel's line in the list.
KernelInfo listed() {
    for (const KernelInfo& info : kernels())
        if (info.name == "cuda-cublas") return info;
    return {};
}

// Everywhere that a missing CUDA shows, the same reason.
void expect_unavailable(const std::string& reason) {
    ASSERT_NE(cuda_unavailable(), nullptr);
    EXPECT_EQ(cuda_unavailable(), reason);
    EXPECT_EQ(cuda_device_count(), 0);
    EXPECT_FALSE(listed().usable);
    EXPECT_EQ(listed().reason, reason);
    Call call(1, 4, 4, 1, 1, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    EXPECT_EQ(message_of<UnsupportedError>([&] { attention_forward(problem, on("cuda:1")); }),
              "device: cuda:1 cannot be used: " + reason);
    EXPECT_EQ(message_of<UnsupportedError>([&] { attention_forward(problem, on({}, "cuda-cublas")); }),
              "kernel: \"cuda-cublas\" cannot compute this call: " + reason);
    EXPECT_EQ(message_of<UnsupportedError>([&] { cuda_own_stream(0); }),
              "device: CUDA cannot be used: " + reason);
    const Explanation e = explain(problem);  // nobody asked for a GPU
    EXPECT_EQ(e.device, "cpu");
    EXPECT_TRUE(has(e.device_choice, "estimated")) << e.device_choice;
    EXPECT_FALSE(has(e.device_choice, reason)) << e.device_choice;  // the CPU would have been taken anyway
    EXPECT_EQ(e.refused.back().kernel, "cuda-cublas");
    EXPECT_EQ(e.refused.back().reason, reason);
    Call large(1, 2048, 2048, 1, 1, 32, 32);
    const Explanation wanted = explain(make_problem(large.params));
    EXPECT_EQ(wanted.device, "cpu");
    EXPECT_TRUE(has(wanted.device_choice, "; CUDA: " + reason)) << wanted.device_choice;
}

// ---- one process each ---------------------------------------------------------------------------------
TEST(Probe, DISABLED_NoDriver) {
    emulator::set_driver_version(0);
    expect_unavailable("no NVIDIA driver is installed on this machine");
    emulator::set_driver_version(13000);  // the answer is kept
    EXPECT_NE(cuda_unavailable(), nullptr);
}

TEST(Probe, DISABLED_OldDriver) {
    emulator::set_driver_version(12040);
    expect_unavailable("the NVIDIA driver supports CUDA 12.4, this build needs 13.0 or newer");
}

TEST(Probe, DISABLED_NoDevice) {
    emulator::set_device_count(0);
    expect_unavailable("no CUDA device is visible to this process");
}

TEST(Probe, DISABLED_DriverThatFails) {
    emulator::fail_next("device_count", 719);
    expect_unavailable(
        "the CUDA driver cannot be started: cudaErrorLaunchFailure (unspecified launch failure)");
}

TEST(Probe, DISABLED_NoLibraryYet) {
    emulator::set_cublas_available(false);
    expect_unavailable("the emulated GPU was told to have no cuBLASLt");
    emulator::set_cublas_available(true);
    EXPECT_EQ(cuda_unavailable(), nullptr);
    EXPECT_EQ(cuda_device_count(), 2);
    EXPECT_TRUE(listed().usable);
    Call call(1, 4, 4, 1, 1, 8, 8);
    EXPECT_EQ(explain(make_problem(call.params), on("cuda")).kernel, "cuda-cublas");
    emulator::set_cublas_available(false);  // what was opened stays
    EXPECT_EQ(cuda_unavailable(), nullptr);
}

// Threads that ask while the library is missing all get text that stays readable.
TEST(Probe, DISABLED_ReasonOutlivesTheNextQuestion) {
    emulator::set_cublas_available(false);
    const char* const first = cuda_unavailable();
    ASSERT_NE(first, nullptr);
    const std::string text = first;
    for (int round = 0; round < 10; ++round) ASSERT_NE(cuda_unavailable(), nullptr);
    EXPECT_EQ(cuda_unavailable(), first);
    EXPECT_EQ(text, first);
}

constexpr int kSaidSo = 42;

// The exit status of a child that was forked here and now and runs f.
template <class F>
int status_of_fork(F f) {
    const pid_t child = fork();
    if (child == 0) _exit(f() ? kSaidSo : 1);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Probe, DISABLED_Forks) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    // Before CUDA was started a child may start it.
    EXPECT_EQ(status_of_fork([] { return cuda_unavailable() == nullptr; }), kSaidSo);
    attention_forward(problem, on("cuda"));
    EXPECT_EQ(status_of_fork([&] {
                  const std::string reason =
                      "CUDA was started before this process was forked, and does not work in a child (use "
                      "the start "
                      "method \"spawn\")";
                  expect_unavailable(reason);
                  attention_forward(problem);  // the CPU is still there
                  return !::testing::Test::HasFailure();
              }),
              kSaidSo);
    EXPECT_EQ(cuda_unavailable(), nullptr);  // here all is as it was
    attention_forward(problem, on("cuda"));
}

// With FASTATTN_DEVICE=cuda and FASTATTN_TF32=1.
TEST(Probe, DISABLED_Environment) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const Explanation e = explain(make_problem(call.params));
    EXPECT_EQ(e.device, "cuda:0");
    EXPECT_EQ(e.device_choice, "FASTATTN_DEVICE asks for it");
    EXPECT_TRUE(has(e.algorithm, ", TF32")) << e.algorithm;
    emulator::take_matmuls();
    attention_forward(make_problem(call.params));
    const auto products = emulator::take_matmuls();
    ASSERT_EQ(products.size(), 2u);
    for (const auto& product : products) EXPECT_EQ(product.compute, cuda::cublas::kCompute32FFastTf32);
    EXPECT_EQ(explain(make_problem(call.params), on("cpu")).device, "cpu");  // the call's word is stronger
}

class OwnProcess : public ::testing::TestWithParam<const char*> {};

TEST_P(OwnProcess, Passes) {
    std::vector<std::pair<std::string, std::string>> environment;
    if (std::string_view(GetParam()) == "Environment")
        environment = {{"FASTATTN_DEVICE", "cuda"}, {"FASTATTN_TF32", "1"}};
    const testing::ChildResult child =
        testing::run_test_in_child(std::string("Probe.DISABLED_") + GetParam(), environment);
    if (!child.started) GTEST_SKIP() << "this binary cannot start itself here";
    EXPECT_TRUE(child.passed) << child.output;
}

INSTANTIATE_TEST_SUITE_P(All, OwnProcess,
                         ::testing::Values("NoDriver", "OldDriver", "NoDevice", "DriverThatFails",
                                           "NoLibraryYet", "ReasonOutlivesTheNextQuestion", "Forks",
                                           "Environment"),
                         [](const auto& name) { return std::string(name.param); });

// ---- with two devices -----------------------------------------------------------------------------------
class Dispatch : public ::testing::Test {
protected:
    void SetUp() override { emulator::reset(); }
    void TearDown() override { set_device_speeds({}); }
};

TEST_F(Dispatch, KernelIsListed) {
    const KernelInfo info = listed();
    EXPECT_EQ(info.device, "cuda");
    EXPECT_TRUE(info.usable) << info.reason;
    EXPECT_EQ(info.dtypes, (std::vector{DType::f64, DType::f32, DType::f16, DType::bf16}));
    EXPECT_EQ(cuda_device_count(), 2);
}

TEST_F(Dispatch, DeviceBeyondTheLast) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    const std::string running =
        message_of<UnsupportedError>([&] { attention_forward(problem, on("cuda:2")); });
    EXPECT_EQ(running, "device: cuda:2 cannot be used: this process sees 2 CUDA devices");
    EXPECT_EQ(message_of<UnsupportedError>([&] { explain(problem, on("cuda:2")); }), running);
}

TEST_F(Dispatch, HostArraysOnADeviceThatWasAskedFor) {
    Call call(2, 5, 7, 4, 2, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    attention_forward(problem, on({}, "cpu-reference"));
    const std::vector<float> expected = call.out.data;
    struct Case {
        RunOptions options;
        const char *device, *choice;
    };
    for (const Case& c : {Case{on("cuda"), "cuda:0", "the call asks for it"},
                          Case{on("cuda:1"), "cuda:1", "the call asks for it"},
                          Case{on({}, "cuda-cublas"), "cuda:0", "the kernel that was asked for runs there"},
                          Case{on("cuda:1", "cuda-cublas"), "cuda:1", "the call asks for it"}}) {
        const Explanation e = explain(problem, c.options);
        EXPECT_EQ(e.kernel, "cuda-cublas");
        EXPECT_EQ(e.device, c.device);
        EXPECT_EQ(e.device_choice, c.choice);
        EXPECT_EQ(e.algorithm,
                  "cuBLAS, scores in 1 chunk, the first of 5 rows x 8 heads, arrays staged in 1 unit");
        EXPECT_EQ(e.refused.size() + 1, kernels().size());
        std::fill(call.out.data.begin(), call.out.data.end(), -7.0f);
        emulator::take_matmuls();
        attention_forward(problem, c.options);  // done when it returns
        EXPECT_FALSE(emulator::take_matmuls().empty()) << "not on the GPU";
        for (std::size_t n = 0; n < expected.size(); ++n) EXPECT_NEAR(call.out[n], expected[n], 1e-5);
    }
    EXPECT_EQ(explain(problem, on({}, "cpu-scalar")).device, "cpu");
    EXPECT_EQ(explain(problem, on("cpu")).device_choice, "the call asks for it");
}

TEST_F(Dispatch, DeviceArraysStayWhereTheyAre) {
    Call call(2, 5, 7, 4, 2, 8, 8);
    const AttentionProblem there = make_problem(on_device(call.params, 1));
    for (const RunOptions& options : {on({}), on("cuda"), on("cuda:1"), on({}, "cuda-cublas")})
        EXPECT_EQ(explain(there, options).device, "cuda:1");
    EXPECT_EQ(explain(there).device_choice, "the arrays are there");
    EXPECT_EQ(explain(there).algorithm, "cuBLAS, scores in 1 chunk, the first of 5 rows x 8 heads");
    const auto refused = [&](const RunOptions& options) {
        const std::string running = message_of<UnsupportedError>([&] { attention_forward(there, options); });
        EXPECT_EQ(message_of<UnsupportedError>([&] { explain(there, options); }), running);
        return running;
    };
    EXPECT_EQ(refused(on({}, "cpu-scalar")), "kernel: \"cpu-scalar\" does not run on device cuda:1");
    EXPECT_EQ(refused(on("cpu")), "device: the arrays are on cuda:1, so the call cannot run on cpu");
    EXPECT_EQ(refused(on("cuda:0")), "device: the arrays are on cuda:1, so the call cannot run on cuda:0");
    Call host(1, 4, 4, 1, 1, 8, 8);
    EXPECT_EQ(message_of<UnsupportedError>(
                  [&] { attention_forward(make_problem(host.params), on("cpu", "cuda-cublas")); }),
              "kernel: \"cuda-cublas\" does not run on device cpu");
    EXPECT_EQ(explain(make_problem(host.params), on("cpu")).refused.back().reason, "the call runs on cpu");
}

// Nobody waits for a call on device arrays: it is done when its stream gets there.
TEST_F(Dispatch, DeviceArraysAreQueuedInTheCallersStream) {
    Call call(2, 5, 7, 4, 2, 8, 8);
    attention_forward(make_problem(call.params), on("cpu"));
    const std::vector<float> expected = call.out.data;
    std::fill(call.out.data.begin(), call.out.data.end(), -7.0f);
    cuda::Stream stream = nullptr, other = nullptr;
    ASSERT_EQ(cuda::runtime::create_stream(&stream), 0);
    ASSERT_EQ(cuda::runtime::create_stream(&other), 0);
    RunOptions options;
    options.stream = stream;
    attention_forward(make_problem(on_device(call.params)), options);
    cuda::runtime::synchronize(other);
    EXPECT_GT(emulator::pending(), 0u);
    for (const float x : call.out.data) EXPECT_EQ(x, -7.0f);
    cuda::runtime::synchronize(stream);
    EXPECT_EQ(emulator::pending(), 0u);
    EXPECT_EQ(emulator::live_allocations(), 0u);
    for (std::size_t n = 0; n < expected.size(); ++n) EXPECT_NEAR(call.out[n], expected[n], 1e-5);
    cuda::runtime::destroy_stream(stream);
    cuda::runtime::destroy_stream(other);
}

TEST_F(Dispatch, WorkspaceBytesAreWhatACallTakes) {
    Call call(2, 50, 700, 4, 2, 8, 8);
    Array<float> bias = random_array<float>({4, 1, 700}, 4);
    Array<std::int64_t> lens({2}, 600);
    call.params.bias = bias.view();
    call.params.kv_lens = lens.view();
    call.params.causal = true;
    for (const AttentionParams& params : {call.params, on_device(call.params)}) {
        const AttentionProblem problem = make_problem(params);
        const auto bytes = static_cast<std::size_t>(explain(problem, on("cuda")).workspace_bytes);
        EXPECT_GE(bytes, cuda::kGemmWorkspaceBytes);
        emulator::set_memory_limit(bytes - 1);
        EXPECT_EQ(
            message_of<OutOfMemory>([&] { attention_forward(problem, on("cuda")); }),
            "fastattn: no memory for the device's workspace: " + std::to_string(bytes) + " bytes asked for");
        emulator::set_memory_limit(bytes);
        EXPECT_NO_THROW(attention_forward(problem, on("cuda")));
        emulator::synchronize_all();
    }
}

// Lengths of any dtype, and one for all.
TEST_F(Dispatch, WorkspaceBytesWithOtherLengths) {
    Call call(100, 2, 3, 1, 1, 8, 8);
    Array<std::int32_t> lens({100}, 2);
    for (const std::int64_t stride : {1, 0}) {
        call.params.kv_lens = testing::make_view(lens.data.data(), DType::i32, {100}, {stride});
        const AttentionProblem problem = make_problem(on_device(call.params));
        emulator::set_memory_limit(static_cast<std::size_t>(explain(problem).workspace_bytes));
        EXPECT_NO_THROW(attention_forward(problem));
        emulator::synchronize_all();
    }
}

TEST_F(Dispatch, ChunksAreCounted) {
    Call call(1, 300, 1000, 2, 1, 8, 8);
    const AttentionProblem problem = make_problem(on_device(call.params));
    // 1 MiB of scores: 131 rows of 2 heads, so 128.
    EXPECT_EQ(explain(problem).algorithm, "cuBLAS, scores in 3 chunks, the first of 128 rows x 2 heads");
}

TEST_F(Dispatch, NothingToCompute) {
    Call call(2, 0, 7, 4, 2, 8, 8);
    const Explanation e = explain(make_problem(call.params), on("cuda"));
    EXPECT_EQ(e.algorithm, "nothing to compute");
    EXPECT_EQ(e.workspace_bytes, 0);
    EXPECT_NO_THROW(attention_forward(make_problem(call.params), on("cuda")));
}

TEST_F(Dispatch, HostArraysGoWhereTheEstimateSaysThatTheyAreFaster) {
    Call large(1, 1024, 1024, 8, 8, 64, 64), small(1, 4, 4, 1, 1, 8, 8);
    const auto device_of = [](Call& call) {
        const Explanation e = explain(make_problem(call.params));
        EXPECT_TRUE(e.device_choice.starts_with("estimated ")) << e.device_choice;
        EXPECT_TRUE(e.device_choice.ends_with(" on a GPU with transfers")) << e.device_choice;
        return e.device;
    };
    DeviceSpeeds fast;
    fast.gpu_f32 = fast.to_device = fast.to_host = 1e18;
    fast.gpu_seconds = 1e-9;
    set_device_speeds(fast);
    EXPECT_EQ(device_of(large), "cuda:0");
    EXPECT_EQ(explain(make_problem(large.params), on("cpu")).device, "cpu");
    EXPECT_EQ(device_of(small), "cpu");  // no transfer pays
    DeviceSpeeds slow;
    slow.to_device = 1e3;
    set_device_speeds(slow);
    EXPECT_EQ(device_of(large), "cpu");
}

// ---- the pieces that calls are made of ------------------------------------------------------------------
TEST_F(Dispatch, ContextIsMadeOnceForEachDevice) {
    const cuda::DeviceContext &first = cuda::context(0), &second = cuda::context(1);
    EXPECT_EQ(first.index, 0);
    EXPECT_EQ(second.index, 1);
    EXPECT_NE(first.pool, second.pool);
    EXPECT_NE(&cuda::cublas::plans_of(first), &cuda::cublas::plans_of(second));
    EXPECT_EQ(&cuda::cublas::plans_of(first), &cuda::cublas::plans_of(first));
    EXPECT_STREQ(second.properties.name, "emulated GPU (tests only)");
    const std::size_t pools = emulator::calls("create_pool");
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) threads.emplace_back([&] { EXPECT_EQ(&cuda::context(1), &second); });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(emulator::calls("create_pool"), pools);
}

TEST_F(Dispatch, CurrentDeviceIsPutBack) {
    const auto current = [] {
        int device = -1;
        EXPECT_EQ(cuda::runtime::current_device(&device), 0);
        return device;
    };
    {
        const cuda::CurrentDevice other(1);
        EXPECT_EQ(current(), 1);
        const cuda::CurrentDevice same(1);
        EXPECT_EQ(current(), 1);
    }
    EXPECT_EQ(current(), 0);
    Call call(1, 4, 4, 1, 1, 8, 8);
    emulator::fail_next("Matmul", 13);
    EXPECT_THROW(attention_forward(make_problem(call.params), on("cuda:1")), CudaError);
    EXPECT_EQ(current(), 0);
}

TEST_F(Dispatch, DeviceMemory) {
    const cuda::DeviceContext& context = cuda::context(0);
    {
        const cuda::DeviceMemory none(context, 0, nullptr, "nothing"),
            some(context, 100, nullptr, "something");
        EXPECT_EQ(none.data(), nullptr);
        EXPECT_NE(some.data(), nullptr);
        EXPECT_EQ(emulator::live_allocations(), 1u);
    }
    EXPECT_EQ(emulator::live_allocations(), 1u);  // until the stream gets there
    emulator::synchronize_all();
    EXPECT_EQ(emulator::live_allocations(), 0u);
    EXPECT_EQ(message_of<OutOfMemory>(
                  [&] { cuda::DeviceMemory(context, std::size_t{3} << 30, nullptr, "too much"); }),
              "fastattn: no memory for too much: 3221225472 bytes asked for");
}

TEST_F(Dispatch, CarverCountsAndCuts) {
    alignas(256) static std::byte block[1024];
    for (std::byte* const start : {static_cast<std::byte*>(nullptr), block}) {
        cuda::Carver carver(start);
        std::byte *const first = carver.take(1), *const second = carver.take(256),
                         *const none = carver.take(0), *const last = carver.take(257);
        EXPECT_EQ(carver.used(), 1024u);
        if (start == nullptr) {
            EXPECT_EQ(last, nullptr);
        } else {
            EXPECT_EQ(first, block);
            EXPECT_EQ(second, block + 256);
            EXPECT_EQ(none, block + 512);
            EXPECT_EQ(last, block + 512);
        }
    }
}

// Failures on device arrays, where nothing is waited for: what was queued stays queued, and is tidied up.
TEST_F(Dispatch, FailuresWithDeviceArrays) {
    Call call(2, 5, 7, 4, 2, 8, 8);
    Array<std::int64_t> lens({2}, 6);
    Array<float> bias = random_array<float>({5, 7}, 4);
    call.params.kv_lens = lens.view();
    call.params.bias = bias.view();
    attention_forward(make_problem(call.params), on("cpu"));
    const std::vector<float> expected = call.out.data;
    const AttentionProblem there = make_problem(on_device(call.params));
    attention_forward(there);
    emulator::synchronize_all();
    for (const char* function : {"current_device", "allocate", "copy", "launch", "Matmul"}) {
        emulator::reset();
        attention_forward(there);
        const std::size_t calls = emulator::calls(function);
        ASSERT_GT(calls, 0u);
        for (std::size_t n = 0; n < calls; ++n) {
            SCOPED_TRACE(::testing::Message() << function << " " << n);
            const bool product = std::string_view(function) == "Matmul";
            emulator::fail_next(function, product ? 14 : 700, n);
            const std::string message = message_of<CudaError>([&] { attention_forward(there); });
            EXPECT_TRUE(has(message, product ? "CUBLAS_STATUS_INTERNAL_ERROR" : "which must restart"))
                << message;
            emulator::synchronize_all();
            EXPECT_EQ(emulator::live_allocations(), 0u);
            std::fill(call.out.data.begin(), call.out.data.end(), -7.0f);
            attention_forward(there);
            emulator::synchronize_all();
            for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(call.out[i], expected[i], 1e-5);
        }
    }
}

}  // namespace
}  // namespace fastattn
