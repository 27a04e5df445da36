#include <fastattn/attention.h>

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>

#include "arrays.h"
#include "child_process.h"
#include "core/kernel.h"
#include "core/workspace_memory.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitizer = true;
#else
constexpr bool kSanitizer = false;
#endif

namespace fastattn::testing {
namespace {

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

RunOptions with_kernel(std::string_view name) {
    RunOptions options;
    options.kernel = name;
    return options;
}

std::string unsupported(const AttentionProblem& problem, const RunOptions& options) {
    const std::string running = message_of<UnsupportedError>([&] { attention_forward(problem, options); });
    EXPECT_EQ(message_of<UnsupportedError>([&] { explain(problem, options); }), running);
    return running;
}

TEST(Kernels, TableEndsInTheReferenceAndListsReasons) {
    const std::vector<KernelInfo> infos = kernels();
    ASSERT_EQ(infos.size(), cpu_kernels().size() + cuda_kernels().size());
    const KernelInfo& last = infos[cpu_kernels().size() - 1];
    EXPECT_EQ(last.name, "cpu-reference");
    EXPECT_TRUE(last.usable);
    EXPECT_EQ(last.dtypes.size(), 4u);
    for (const KernelInfo& info : infos) {
        EXPECT_EQ(info.usable, info.reason.empty()) << info.name;
        EXPECT_FALSE(info.dtypes.empty()) << info.name;
        EXPECT_EQ(std::count_if(infos.begin(), infos.end(),
                                [&](const KernelInfo& x) { return x.name == info.name; }),
                  1);
    }
}

TEST(Dispatch, TakesTheFirstKernelThatSupportsTheProblem) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    std::string first;
    for (const Kernel& kernel : cpu_kernels()) {
        const bool takes =
            std::find(kernel.dtypes.begin(), kernel.dtypes.end(), DType::f32) != kernel.dtypes.end();
        if (first.empty() && kernel.unavailable() == nullptr && takes &&
            kernel.forward.refuses(problem) == nullptr)
            first = kernel.name;
    }
    const Explanation e = explain(problem);
    EXPECT_EQ(e.kernel, first);
    EXPECT_EQ(e.device, "cpu");
    EXPECT_FALSE(e.algorithm.empty());
    EXPECT_GE(e.threads, 1);
    EXPECT_EQ(e.flops, 4 * 4 * 2 * 16);
    EXPECT_EQ(e.bytes, 4 * 4 * 8 * 4);
    EXPECT_EQ(e.refused.size() + 1, kernels().size());
    for (const Refusal& refusal : e.refused) EXPECT_FALSE(refusal.reason.empty()) << refusal.kernel;
}

TEST(Dispatch, EveryUsableKernelCanBeForcedAndTheOthersSayWhyNot) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    for (const KernelInfo& info : kernels()) {
        const bool takes = std::find(info.dtypes.begin(), info.dtypes.end(), DType::f32) != info.dtypes.end();
        if (info.usable && takes) {
            const Explanation e = explain(problem, with_kernel(info.name));
            EXPECT_EQ(e.kernel, info.name);
            for (const Refusal& refusal : e.refused) EXPECT_NE(refusal.kernel, info.name);
            std::fill(call.out.data.begin(), call.out.data.end(), -7.0f);
            attention_forward(problem, with_kernel(info.name));
            for (const float x : call.out.data) EXPECT_NE(x, -7.0f);
        } else {
            const std::string message = unsupported(problem, with_kernel(info.name));
            EXPECT_TRUE(has(message, "kernel: \"" + info.name + "\" cannot compute this call: ")) << message;
            EXPECT_TRUE(has(message, info.usable ? "not float32" : info.reason)) << message;
        }
    }
}

TEST(Dispatch, UnknownKernelListsTheKnown) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const std::string message = unsupported(make_problem(call.params), with_kernel("cpu-magic"));
    EXPECT_TRUE(has(message, "got \"cpu-magic\"")) << message;
    for (const KernelInfo& info : kernels()) EXPECT_TRUE(has(message, info.name)) << message;
}

TEST(Dispatch, Devices) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    const AttentionProblem problem = make_problem(call.params);
    RunOptions options;
    options.device = "cpu";
    EXPECT_EQ(explain(problem, options).device, "cpu");
    for (const char* bad : {"tpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "CPU", "cuda1"}) {
        options.device = bad;
        EXPECT_EQ(message_of<ValueError>([&] { explain(problem, options); }),
                  "device: expected \"cpu\", \"cuda\" or \"cuda:N\", got \"" + std::string(bad) + "\"");
    }
    if (cuda_unavailable() != nullptr) {
        for (const auto& [asked, named] : {std::pair{"cuda", "cuda:0"}, {"cuda:3", "cuda:3"}}) {
            options.device = asked;
            EXPECT_EQ(unsupported(problem, options),
                      "device: " + std::string(named) + " cannot be used: " + cuda_unavailable());
        }
    }
    // Arrays on a GPU are not taken for the CPU's.
    for (TensorView* view : {&call.params.q, &call.params.k, &call.params.v, &call.params.out})
        view->device = {DeviceType::cuda, 0};
    options.device = "cpu";
    EXPECT_TRUE(has(unsupported(make_problem(call.params), options), "device: the arrays are on cuda:0"));
}

TEST(Dispatch, ThreadsNeverExceedTheItems) {
    Call call(2, 40, 8, 1, 1, 8, 8);
    RunOptions options = with_kernel("cpu-reference");
    options.num_threads = 3;
    Explanation e = explain(make_problem(call.params), options);
    EXPECT_EQ(e.work_items, 6);
    EXPECT_EQ(e.threads, 3);
    EXPECT_EQ(e.workspace_bytes, 3 * 128);  // D + Dv doubles in each slot
    options.num_threads = 100;
    e = explain(make_problem(call.params), options);
    EXPECT_EQ(e.threads, 6);
    EXPECT_EQ(e.workspace_bytes, 6 * 128);
}

TEST(Dispatch, PollCancelsALongCall) {
    Call call(1, 600, 600, 8, 8, 64, 64);
    const AttentionProblem problem = make_problem(call.params);
    for (const KernelInfo& info : kernels()) {
        const bool takes = std::find(info.dtypes.begin(), info.dtypes.end(), DType::f32) != info.dtypes.end();
        if (!info.usable || !takes) continue;
        // A fast kernel may end before it is polled.
        bool asked = false;
        RunOptions options = with_kernel(info.name);
        options.poll_context = &asked;
        options.poll = [](void* context) { return *static_cast<bool*>(context) = true; };
        const auto start = std::chrono::steady_clock::now();
        bool cancelled = false;
        try {
            attention_forward(problem, options);
        } catch (const Cancelled&) {
            cancelled = true;
        }
        EXPECT_EQ(cancelled, asked) << info.name;
        EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5)) << info.name;
        if (info.name == "cpu-reference") {
            EXPECT_TRUE(cancelled);
        }
    }
}

TEST(Dispatch, ACallFromWithinACallHasItsOwnWorkspace) {
    // The outer call must last longer than the interval of polling, 20 ms, on a fast machine too.
    Call outer(1, 800, 800, 4, 4, 32, 32), inner(1, 16, 16, 1, 1, 32, 32);
    const RunOptions reference = with_kernel("cpu-reference");
    attention_forward(make_problem(outer.params), reference);
    attention_forward(make_problem(inner.params), reference);
    const std::vector<float> outer_alone = outer.out.data, inner_alone = inner.out.data;
    struct Inside {
        AttentionProblem problem;
        int calls = 0;
    } inside{make_problem(inner.params)};
    RunOptions options = reference;
    options.num_threads = 1;
    options.poll_context = &inside;
    options.poll = [](void* context) {
        auto& self = *static_cast<Inside*>(context);
        attention_forward(self.problem, with_kernel("cpu-reference"));
        ++self.calls;
        return false;
    };
    for (int n = 0; n < 50 && inside.calls == 0; ++n) attention_forward(make_problem(outer.params), options);
    EXPECT_GT(inside.calls, 0);
    EXPECT_EQ(outer.out.data, outer_alone);
    EXPECT_EQ(inner.out.data, inner_alone);
}

TEST(Dispatch, NoMemoryForTheWorkspaceNamesTheBytes) {
    if (kSanitizer) GTEST_SKIP() << "the sanitizers' allocators end the process";
    // D = 2^45 by zero strides: the reference asks for that many doubles.
    float one = 1, out = 0;
    constexpr std::int64_t D = std::int64_t{1} << 45;
    AttentionParams params;
    params.q = params.k = make_view(&one, DType::f32, {1, D}, {0, 0});
    params.v = make_view(&one, DType::f32, {1, 1}, {1, 1});
    params.out = make_view(&out, DType::f32, {1, 1}, {1, 1});
    const AttentionProblem problem = make_problem(params);
    const RunOptions options = with_kernel("cpu-reference");
    const std::int64_t bytes = explain(problem, options).workspace_bytes;
    EXPECT_EQ(bytes, D * 8 + 64);
    EXPECT_EQ(message_of<OutOfMemory>([&] { attention_forward(problem, options); }),
              "fastattn: no memory for the workspace: " + std::to_string(bytes) + " bytes asked for");
    Call next(1, 4, 4, 1, 1, 8, 8);
    EXPECT_NO_THROW(attention_forward(make_problem(next.params)));
}

TEST(WorkspaceMemory, IsAlignedAndReusedByTheThread) {
    const std::byte* first = nullptr;
    {
        const WorkspaceMemory memory(100000);
        first = memory.data();
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first) % 64, 0u);
        const WorkspaceMemory within(100);
        EXPECT_NE(within.data(), first);
    }
    {
        const WorkspaceMemory again(5000);
        EXPECT_EQ(again.data(), first);
    }
    const std::byte* elsewhere = nullptr;
    std::thread([&] {
        const WorkspaceMemory other(5000);
        elsewhere = other.data();
    }).join();
    EXPECT_NE(elsewhere, first);
    {
        const WorkspaceMemory large(WorkspaceMemory::kCachedBytes + 1);
        EXPECT_NE(large.data(), first);
    }
    const WorkspaceMemory after(5000);
    EXPECT_EQ(after.data(), first);  // the large block did not push it out
    EXPECT_EQ(WorkspaceMemory(0).data(), nullptr);
}

TEST(Dispatch, SixteenCallersAtOnce) {
    std::vector<std::thread> threads;
    std::atomic<int> equal{0};
    Call model(2, 33, 33, 2, 2, 16, 16);
    attention_forward(make_problem(model.params));
    for (int n = 0; n < 16; ++n) {
        threads.emplace_back([&] {
            Call call(2, 33, 33, 2, 2, 16, 16);
            RunOptions options;
            options.num_threads = 3;
            for (int round = 0; round < 5; ++round) attention_forward(make_problem(call.params), options);
            equal += call.out.data == model.out.data;
        });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(equal, 16);
}

TEST(Explain, CountsWhatIsReadAndWrittenOnce) {
    Call call(2, 3, 5, 4, 2, 8, 6);
    Array<std::uint8_t> mask({1, 5});
    Array<float> lse({2, 4, 3}), weights({2, 4, 3, 5});
    call.params.mask = mask.view();
    call.params.lse = lse.view();
    call.params.weights = weights.view();
    const double floats =
        2 * 3 * 4 * 8 + 2 * 5 * 2 * 8 + 2 * 5 * 2 * 6 + 2 * 3 * 4 * 6 + 2 * 4 * 3 + 2 * 4 * 3 * 5;
    EXPECT_EQ(explain(make_problem(call.params)).bytes, floats * 4 + 5);
    call.params.out.data = call.params.lse.data = call.params.weights.data = nullptr;
    EXPECT_EQ(explain(make_problem(call.params, false)).bytes, floats * 4 + 5);
    call.params.out = TensorView{};
    EXPECT_EQ(explain(make_problem(call.params, false)).bytes, floats * 4 + 5);
}

// ---- the environment: read once, so each in a fresh process -----------------------------------------
TEST(EnvironmentChild, DISABLED_KernelIsTheReference) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    EXPECT_EQ(explain(make_problem(call.params)).kernel, "cpu-reference");
    EXPECT_TRUE(has(unsupported(make_problem(call.params), with_kernel("other")), "got \"other\""));
    setenv("FASTATTN_KERNEL", "other", 1);  // too late
    EXPECT_EQ(explain(make_problem(call.params)).kernel, "cpu-reference");
}

TEST(EnvironmentChild, DISABLED_KernelIsUnknown) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    EXPECT_TRUE(has(unsupported(make_problem(call.params), {}), "got \"cpu-magic\""));
    attention_forward(make_problem(call.params), with_kernel("cpu-reference"));
}

TEST(EnvironmentChild, DISABLED_DeviceIsBad) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    EXPECT_TRUE(has(message_of<ValueError>([&] { explain(make_problem(call.params)); }), "got \"abacus\""));
    RunOptions options;
    options.device = "cpu";
    EXPECT_EQ(explain(make_problem(call.params), options).device, "cpu");
}

TEST(EnvironmentChild, DISABLED_Verbose) {
    Call call(1, 4, 4, 1, 1, 8, 8);
    attention_forward(make_problem(call.params), with_kernel("cpu-reference"));
    attention_forward(make_problem(call.params), with_kernel("cpu-reference"));
}

class Environment : public ::testing::Test {
protected:
    std::string output;

    void run(const std::string& test, const std::string& name, const std::string& value) {
        const ChildResult child = run_test_in_child("EnvironmentChild.DISABLED_" + test, {{name, value}});
        if (!child.started) GTEST_SKIP() << "this binary cannot start itself";
        EXPECT_TRUE(child.passed) << child.output;
        output = child.output;
    }
    int verbose_lines() const {
        int lines = 0;
        for (std::size_t at = 0;
             (at = output.find("fastattn: cpu-reference float32 B=1", at)) != std::string::npos; ++at)
            ++lines;
        return lines;
    }
};

TEST_F(Environment, Kernel) { run("KernelIsTheReference", "FASTATTN_KERNEL", "cpu-reference"); }
TEST_F(Environment, UnknownKernel) { run("KernelIsUnknown", "FASTATTN_KERNEL", "cpu-magic"); }
TEST_F(Environment, Device) { run("DeviceIsBad", "FASTATTN_DEVICE", "abacus"); }
TEST_F(Environment, VerbosePrintsOneLineForEachCall) {
    run("Verbose", "FASTATTN_VERBOSE", "1");
    if (!IsSkipped()) {
        EXPECT_EQ(verbose_lines(), 2) << output;
    }
    run("Verbose", "FASTATTN_VERBOSE", "0");
    EXPECT_EQ(verbose_lines(), 0) << output;
}

}  // namespace
}  // namespace fastattn::testing
