// What dispatch knows of a kernel. A kernel never validates, never allocates and never sees Python:
// it asks for workspace through plan() and is handed it in run().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include <fastattn/attention.h>

#include "threads/executor.h"

namespace fastattn {

// What plan() has found out for run(), in a form of the kernel's own.
struct Schedule {
    Schedule() = default;
    Schedule(const Schedule&) = delete;
    Schedule& operator=(const Schedule&) = delete;
    virtual ~Schedule() = default;
};

struct KernelPlan {
    std::size_t shared_bytes = 0;      // once per call
    std::size_t per_thread_bytes = 0;  // once per executing thread
    std::size_t device_bytes = 0;      // on a CUDA device, whose memory the kernel takes in its stream
    std::int64_t work_items = 0;
    std::string algorithm;             // filled only when describe is set
    std::unique_ptr<const Schedule> schedule;  // may be empty
};

struct Workspace {
    std::byte* shared = nullptr;       // 64-byte aligned
    std::byte* per_thread = nullptr;   // slot s starts at per_thread + s * per_thread_stride
    std::size_t per_thread_stride = 0;
    const Schedule* schedule = nullptr;  // what the same kernel's plan() made
};

// Where a kernel runs.
struct Target {
    Device device;
    void* stream = nullptr;  // RunOptions::stream
};

// What a kernel does for one kind of problem: AttentionProblem (forward) or BackwardProblem.
template <class Problem>
struct Pass {
    // nullptr when the kernel can compute this problem (dtype already checked), else the reason.
    const char* (*refuses)(const Problem&) = nullptr;
    // A pure function of the problem and the thread count; results may not depend on the latter.
    KernelPlan (*plan)(const Problem&, Device device, int threads, bool describe) = nullptr;
    void (*run)(const Problem&, const Target&, const Workspace&, Executor&) = nullptr;
};

struct Kernel {
    const char* name;
    DeviceType device;
    std::span<const DType> dtypes;
    // nullptr when usable on this machine, else the reason.
    const char* (*unavailable)();
    Pass<AttentionProblem> forward;
    Pass<BackwardProblem> backward{};  // empty: the kernel has none
    // Empty when it runs on this device, which is a usable one of `device`'s type, else the reason; nullptr:
    // on all of them.
    std::string (*refuses_device)(Device) = nullptr;
    // Why it is taken only when it is asked for by name, or nullptr: a kernel that its own hardware has not
    // proven.
    const char* unproven = nullptr;
};

// Best first; the last one supports every problem of its device. A missing backend is an empty list.
std::span<const Kernel> cpu_kernels();
std::span<const Kernel> cuda_kernels();
// Why device="cuda" cannot be used, or nullptr when it can. The first call may start the driver.
const char* cuda_unavailable();
int cuda_device_count();  // 0 when unavailable

}  // namespace fastattn
