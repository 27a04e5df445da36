// From a problem to a kernel: walk the device's table, the first row that can compute the problem wins,
// and every refusal keeps its reason. A forced kernel or device is used or refused, never replaced.
#include <fastattn/attention.h>

#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <utility>

#include "core/device_choice.h"
#include "core/environment.h"
#include "core/flops.h"
#include "core/kernel.h"
#include "core/problem_errors.h"
#include "core/workspace_memory.h"
#include "threads/thread_pool.h"

#if !defined(FASTATTN_VERSION)
#define FASTATTN_VERSION "0+unknown"
#endif

namespace fastattn {

const char* version() noexcept { return FASTATTN_VERSION; }

const Environment& environment() {
    // Published by pointer: a static's guard could be held by another thread when the process forks.
    static std::atomic<const Environment*> published{nullptr};
    if (const Environment* known = published.load(std::memory_order_acquire)) return *known;
    const auto text = [](const char* name) {
        const char* value = std::getenv(name);
        return std::string(value == nullptr ? "" : value);
    };
    const auto* fresh = new Environment{text("FASTATTN_KERNEL"), text("FASTATTN_DEVICE"),
                                        text("FASTATTN_VERBOSE") == "1", text("FASTATTN_TF32") == "1"};
    const Environment* earlier = nullptr;
    if (published.compare_exchange_strong(earlier, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
    return *earlier;
}

namespace {

// ---- forward and backward -------------------------------------------------------------------------
const AttentionProblem& forward_of(const AttentionProblem& problem) noexcept { return problem; }
const AttentionProblem& forward_of(const BackwardProblem& problem) noexcept { return problem.forward; }

const Pass<AttentionProblem>& pass_of(const Kernel& kernel, const AttentionProblem&) noexcept {
    return kernel.forward;
}
const Pass<BackwardProblem>& pass_of(const Kernel& kernel, const BackwardProblem&) noexcept {
    return kernel.backward;
}

// Beside the forward's q.k and p.v the backward has two more products for each: 5 instead of 2 at D = Dv.
double flops_of(const AttentionProblem& problem) { return count_flops(problem); }
double flops_of(const BackwardProblem& problem) { return 2.5 * count_flops(problem.forward); }

// ---- the device -----------------------------------------------------------------------------------
std::string quoted(std::string_view text) { return "\"" + std::string(text) + "\""; }

// "cpu", "cuda" (the arrays' own CUDA device, else the first), "cuda:N".
Device parse_device(std::string_view text, Device arrays) {
    if (text == "cpu") return {DeviceType::cpu, 0};
    if (text == "cuda") return arrays.type == DeviceType::cuda ? arrays : Device{DeviceType::cuda, 0};
    constexpr std::string_view prefix = "cuda:";
    Device device{DeviceType::cuda, 0};
    if (text.starts_with(prefix)) {
        const char* first = text.data() + prefix.size();
        const char* last = text.data() + text.size();
        const auto [end, error] = std::from_chars(first, last, device.index);
        if (error == std::errc{} && end == last && first != last && device.index >= 0) return device;
    }
    throw ValueError("device: expected \"cpu\", \"cuda\" or \"cuda:N\", got " + quoted(text));
}

std::span<const Kernel> kernels_of(DeviceType device) {
    return device == DeviceType::cpu ? cpu_kernels() : cuda_kernels();
}

// What was asked for by option or environment; empty: free to choose.
std::string_view asked_kernel(const RunOptions& options) {
    return options.kernel.empty() ? std::string_view(environment().kernel) : options.kernel;
}

bool is_cuda_kernel(std::string_view name) {
    for (const Kernel& kernel : cuda_kernels())
        if (kernel.name == name) return true;
    return false;
}

void check_device(Device device) {
    if (device.type != DeviceType::cuda) return;
    const auto fail = [&](const std::string& reason) {
        throw UnsupportedError("device: " + device_string(device) + " cannot be used: " + reason);
    };
    if (const char* reason = cuda_unavailable()) fail(reason);
    const int count = cuda_device_count();
    if (device.index >= count)
        fail("this process sees " + std::to_string(count) + " CUDA device" + (count == 1 ? "" : "s"));
}

// Waking a worker costs as much as some hundred thousand FLOPs; below that per thread, fewer are faster.
constexpr double kFlopsPerThread = 400e3;

int within_limit(int threads, const RunOptions& options) noexcept {
    return options.max_threads > 0 && options.max_threads < threads ? options.max_threads : threads;
}

int useful_threads(const AttentionProblem& p, const RunOptions& options) noexcept {
    const int threads = within_limit(get_num_threads(), options);
    const double flops = flops_at_most(p);
    if (flops >= kFlopsPerThread * threads) return threads;
    return flops < 2.0 * kFlopsPerThread ? 1 : static_cast<int>(flops / kFlopsPerThread);
}

// For host arrays with no device asked for: the estimate, where a GPU kernel could take the call.
bool faster_on_gpu(const AttentionProblem& problem, const RunOptions& options) {
    if (flops_at_most(problem) < kFlopsForGpu) return false;
    const int threads = within_limit(get_num_threads(), options);
    return estimate_devices(problem, threads, device_speeds()).gpu_is_faster() &&
           cuda_unavailable() == nullptr;
}

struct DeviceChoice {
    Device device;
    const char* reason;  // what explain() says; nullptr: the estimate
    bool by_kernel = false;
};

DeviceChoice choose_device(const AttentionProblem& problem, const RunOptions& options) {
    std::string_view asked = options.device;
    DeviceChoice choice{problem.device, "the call asks for it"};
    if (asked.empty()) {
        asked = environment().device;
        choice.reason = "FASTATTN_DEVICE asks for it";
    }
    if (!asked.empty()) {
        choice.device = parse_device(asked, problem.device);
    } else if (problem.device.type == DeviceType::cuda) {
        choice.reason = "the arrays are there";
    } else if (const std::string_view kernel = asked_kernel(options); !kernel.empty()) {
        choice = {{is_cuda_kernel(kernel) ? DeviceType::cuda : DeviceType::cpu, 0},
                  "the kernel that was asked for runs there",
                  true};
    } else {
        choice = {{faster_on_gpu(problem, options) ? DeviceType::cuda : DeviceType::cpu, 0}, nullptr};
    }
    if (problem.device.type == DeviceType::cuda && !(choice.device == problem.device))
        throw UnsupportedError("device: the arrays are on " + device_string(problem.device) +
                               ", so the call cannot run on " + device_string(choice.device));
    return choice;
}

std::string describe_choice(const AttentionProblem& problem, const DeviceChoice& choice,
                            const RunOptions& options) {
    if (choice.reason != nullptr) return choice.reason;
    const int threads = within_limit(get_num_threads(), options);
    const DeviceEstimate estimate = estimate_devices(problem, threads, device_speeds());
    std::string text = describe(estimate);
    if (const char* reason = estimate.gpu_is_faster() ? cuda_unavailable() : nullptr)
        text += std::string("; CUDA: ") + reason;
    return text;
}

// ---- the kernel -----------------------------------------------------------------------------------
bool takes_dtype(const Kernel& kernel, DType dtype) noexcept {
    for (const DType known : kernel.dtypes)
        if (known == dtype) return true;
    return false;
}

template <class Problem>
const char* refusal_of_pass(const Kernel& kernel, const Problem& problem) {
    const Pass<Problem>& pass = pass_of(kernel, problem);
    return pass.refuses == nullptr ? "it has no backward pass" : pass.refuses(problem);
}

std::string refusal_of_device(const Kernel& kernel, Device device) {
    return kernel.refuses_device == nullptr ? std::string() : kernel.refuses_device(device);
}

template <class Problem>
bool supports(const Kernel& kernel, const Problem& problem, Device device) {
    return kernel.unavailable() == nullptr && takes_dtype(kernel, forward_of(problem).dtype) &&
           refusal_of_pass(kernel, problem) == nullptr && refusal_of_device(kernel, device).empty();
}

// Why supports() is false; empty when it is true.
template <class Problem>
std::string refusal(const Kernel& kernel, const Problem& problem, Device device) {
    if (const char* reason = kernel.unavailable()) return reason;
    const DType dtype = forward_of(problem).dtype;
    if (!takes_dtype(kernel, dtype)) {
        std::string takes;
        for (const DType known : kernel.dtypes)
            takes += (takes.empty() ? "" : ", ") + std::string(dtype_name(known));
        return "takes " + takes + ", not " + dtype_name(dtype);
    }
    if (const char* reason = refusal_of_pass(kernel, problem)) return reason;
    return refusal_of_device(kernel, device);
}

template <class Problem>
const Kernel& forced_kernel(const Problem& problem, Device device, std::string_view name) {
    std::string known;
    for (const DeviceType type : {DeviceType::cpu, DeviceType::cuda}) {
        for (const Kernel& kernel : kernels_of(type)) {
            known += (known.empty() ? "" : ", ") + std::string(kernel.name);
            if (kernel.name != name) continue;
            if (type != device.type)
                throw UnsupportedError("kernel: " + quoted(name) + " does not run on device " +
                                       device_string(device));
            const std::string reason = refusal(kernel, problem, device);
            if (reason.empty()) return kernel;
            throw UnsupportedError("kernel: " + quoted(name) + " cannot compute this call: " + reason);
        }
    }
    throw UnsupportedError("kernel: expected one of " + known + ", got " + quoted(name));
}

template <class Problem>
const Kernel& choose_kernel(const Problem& problem, Device device, const RunOptions& options) {
    const std::string_view asked = asked_kernel(options);
    if (!asked.empty()) return forced_kernel(problem, device, asked);
    for (const Kernel& kernel : kernels_of(device.type))
        if (kernel.unproven == nullptr && supports(kernel, problem, device)) return kernel;
    std::string reasons;
    for (const Kernel& kernel : kernels_of(device.type))
        reasons +=
            std::string(reasons.empty() ? "" : "; ") + kernel.name + ": " + refusal(kernel, problem, device);
    throw UnsupportedError("device: no kernel on " + device_string(device) + " can compute this call (" +
                           reasons + ")");
}

// ---- the plan -------------------------------------------------------------------------------------
struct Plan {
    Device device;
    const Kernel* kernel;
    int threads;
    KernelPlan details;
    std::size_t shared_bytes, per_thread_stride, total_bytes;
};

std::size_t aligned(std::size_t bytes) {
    constexpr std::size_t mask = WorkspaceMemory::kAlignment - 1;
    if (bytes > std::numeric_limits<std::size_t>::max() - mask) throw OutOfMemory("the workspace", bytes);
    return (bytes + mask) & ~mask;
}

template <class Problem>
Plan plan_on(const Problem& problem, Device device, const RunOptions& options, bool describe) {
    const Kernel& kernel = choose_kernel(problem, device, options);
    const auto plan_pass = pass_of(kernel, problem).plan;
    int threads = options.num_threads > 0 ? within_limit(options.num_threads, options)
                                          : useful_threads(forward_of(problem), options);
    if (threads > kMaxThreads) threads = kMaxThreads;
    KernelPlan details = plan_pass(problem, device, threads, describe);
    if (details.work_items < threads) {  // fewer slots, less workspace
        threads = details.work_items < 1 ? 1 : static_cast<int>(details.work_items);
        details = plan_pass(problem, device, threads, describe);
    }
    Plan plan{device, &kernel, threads, std::move(details), 0, 0, 0};
    plan.shared_bytes = aligned(plan.details.shared_bytes);
    plan.per_thread_stride = aligned(plan.details.per_thread_bytes);
    const auto slots = static_cast<std::size_t>(threads);
    constexpr std::size_t limit = std::numeric_limits<std::ptrdiff_t>::max();
    if (plan.shared_bytes > limit || plan.per_thread_stride > (limit - plan.shared_bytes) / slots)
        throw OutOfMemory("the workspace", std::numeric_limits<std::size_t>::max());
    plan.total_bytes = plan.shared_bytes + slots * plan.per_thread_stride;
    return plan;
}

// The plan of a call, and why it runs where it does.
struct ChosenPlan {
    Plan plan;
    DeviceChoice choice;
    std::string obstacle;  // why the GPU that the estimate preferred was not taken
};

template <class Problem>
ChosenPlan make_plan(const Problem& problem, const RunOptions& options, bool describe) {
    DeviceChoice choice = choose_device(forward_of(problem), options);
    std::string obstacle;
    if (choice.reason == nullptr && choice.device.type == DeviceType::cuda) {
        // Nobody asked for the GPU, so what it lacks is no reason to fail.
        try {
            return {plan_on(problem, choice.device, options, describe), choice, {}};
        } catch (const Error& error) {
            obstacle = error.what();
            choice.device = {DeviceType::cpu, 0};
        }
    }
    if (!choice.by_kernel) check_device(choice.device);  // else the kernel says what is missing
    return {plan_on(problem, choice.device, options, describe), choice, std::move(obstacle)};
}

template <class Problem>
void execute(const Problem& problem, const Plan& plan, const RunOptions& options) {
    const WorkspaceMemory memory(plan.total_bytes);
    const Workspace workspace{memory.data(), memory.data() + plan.shared_bytes, plan.per_thread_stride,
                              plan.details.schedule.get()};
    ThreadPoolExecutor executor(plan.threads, options.poll, options.poll_context);
    pass_of(*plan.kernel, problem).run(problem, {plan.device, options.stream}, workspace, executor);
}

// ---- FASTATTN_VERBOSE -------------------------------------------------------------------------------
using Clock = std::chrono::steady_clock;

void print_call(const AttentionProblem& p, const char* pass, double flops, const Plan& plan,
                double milliseconds) {
    const auto n = [](std::int64_t x) { return static_cast<long long>(x); };
    char speed[32] = "queued";  // arrays on a device: the call does not wait for its result
    if (p.device.type == DeviceType::cpu)
        std::snprintf(speed, sizeof speed, "%.1f GFLOP/s", flops / (milliseconds * 1e6));
    std::fprintf(stderr,
                 "fastattn: %s%s %s B=%lld Sq=%lld Sk=%lld Hq=%lld Hkv=%lld D=%lld Dv=%lld%s%s%s%s | %s | "
                 "threads=%d items=%lld workspace=%zu B | %.4f ms, %s\n",
                 plan.kernel->name, pass, dtype_name(p.dtype), n(p.batch), n(p.q_size), n(p.kv_size),
                 n(p.q_heads), n(p.kv_heads), n(p.head_dim), n(p.value_dim), p.causal ? " causal" : "",
                 p.window_left >= 0 || p.window_right >= 0 ? " window" : "",
                 p.mask.data != nullptr ? " mask" : "", p.bias.data != nullptr ? " bias" : "",
                 plan.details.algorithm.c_str(), plan.threads, n(plan.details.work_items),
                 plan.total_bytes + plan.details.device_bytes, milliseconds, speed);
}

const char* pass_name(const AttentionProblem&) { return ""; }
const char* pass_name(const BackwardProblem&) { return " backward"; }

template <class Problem>
void run_plan(const Problem& problem, const Plan& plan, const RunOptions& options) {
    if (!environment().verbose) return execute(problem, plan, options);
    const auto start = Clock::now();
    execute(problem, plan, options);
    print_call(forward_of(problem), pass_name(problem), flops_of(problem), plan,
               std::chrono::duration<double, std::milli>(Clock::now() - start).count());
}

template <class Problem>
void compute(const Problem& problem, const RunOptions& options) {
    const bool verbose = environment().verbose;
    const ChosenPlan chosen = make_plan(problem, options, verbose);
    if (chosen.choice.reason != nullptr || chosen.plan.device.type == DeviceType::cpu)
        return run_plan(problem, chosen.plan, options);
    try {
        run_plan(problem, chosen.plan, options);
    } catch (const OutOfMemory&) {  // of a GPU that nobody asked for; the host's arrays are as they were
        run_plan(problem, plan_on(problem, {DeviceType::cpu, 0}, options, verbose), options);
    }
}

}  // namespace

void attention_forward(const AttentionProblem& problem, const RunOptions& options) {
    compute(problem, options);
}

void attention_backward(const BackwardProblem& problem, const RunOptions& options) {
    compute(problem, options);
}

Explanation explain(const AttentionProblem& problem, const RunOptions& options) {
    const ChosenPlan chosen = make_plan(problem, options, true);
    const Plan& plan = chosen.plan;
    Explanation e;
    e.kernel = plan.kernel->name;
    e.device = device_string(plan.device);
    e.device_choice = describe_choice(problem, chosen.choice, options);
    if (!chosen.obstacle.empty()) e.device_choice += "; " + chosen.obstacle;
    e.algorithm = plan.details.algorithm;
    e.workspace_bytes = static_cast<std::int64_t>(plan.total_bytes + plan.details.device_bytes);
    e.work_items = plan.details.work_items;
    e.threads = plan.threads;
    e.flops = count_flops(problem);
    e.bytes = count_bytes(problem);
    const bool forced = !asked_kernel(options).empty();
    for (const DeviceType type : {DeviceType::cpu, DeviceType::cuda}) {
        for (const Kernel& kernel : kernels_of(type)) {
            if (&kernel == plan.kernel) continue;
            std::string reason;
            if (type == plan.device.type) {
                reason = refusal(kernel, problem, plan.device);
            } else {
                const char* unusable = kernel.unavailable();
                reason = unusable != nullptr ? unusable : "the call runs on " + e.device;
            }
            if (reason.empty() && kernel.unproven != nullptr && !forced) reason = kernel.unproven;
            if (reason.empty()) reason = (forced ? "the call asks for " : "comes after ") + e.kernel;
            e.refused.push_back({kernel.name, reason});
        }
    }
    return e;
}

std::vector<KernelInfo> kernels() {
    std::vector<KernelInfo> infos;
    for (const DeviceType type : {DeviceType::cpu, DeviceType::cuda}) {
        for (const Kernel& kernel : kernels_of(type)) {
            const char* reason = kernel.unavailable();
            infos.push_back({kernel.name,
                             type == DeviceType::cpu ? "cpu" : "cuda",
                             {kernel.dtypes.begin(), kernel.dtypes.end()},
                             reason == nullptr,
                             reason == nullptr ? "" : reason});
        }
    }
    return infos;
}

}  // namespace fastattn
