#include "core/device_choice.h"

#include <atomic>
#include <cstdio>

#include "core/flops.h"

namespace fastattn {
namespace {

// Published by pointer and never freed: a mutex could be held by another thread when the process forks.
std::atomic<const DeviceSpeeds*> speeds_in_use{nullptr};

std::string time_text(double seconds) {
    const bool small = seconds < 1e-3;
    char text[32];
    std::snprintf(text, sizeof text, "%.3g %s", seconds * (small ? 1e6 : 1e3), small ? "us" : "ms");
    return text;
}

}  // namespace

DeviceSpeeds device_speeds() noexcept {
    const DeviceSpeeds* set = speeds_in_use.load(std::memory_order_acquire);
    return set == nullptr ? DeviceSpeeds{} : *set;
}

void set_device_speeds(const DeviceSpeeds& s) {
    for (const double speed : {s.cpu_per_thread_f64, s.cpu_per_thread_f32, s.cpu_per_thread_bf16, s.gpu_f64,
                               s.gpu_f32, s.gpu_half, s.to_device, s.to_host, s.cpu_seconds, s.gpu_seconds}) {
        if (!(speed > 0)) throw ValueError("speeds: expected numbers above 0, got " + std::to_string(speed));
    }
    speeds_in_use.store(new DeviceSpeeds(s), std::memory_order_release);
}

DeviceEstimate estimate_devices(const AttentionProblem& p, int threads, const DeviceSpeeds& s) {
    double cpu = s.cpu_per_thread_f32, gpu = s.gpu_half;
    if (p.dtype == DType::f64) {
        cpu = s.cpu_per_thread_f64;
        gpu = s.gpu_f64;
    } else if (p.dtype == DType::f32) {
        gpu = s.gpu_f32;
    } else if (p.dtype == DType::bf16) {
        cpu = s.cpu_per_thread_bf16;
    }
    const double flops = count_flops(p);
    const double back = count_result_bytes(p), there = count_bytes(p) - back;
    return {s.cpu_seconds + flops / (cpu * threads),
            s.gpu_seconds + flops / gpu + there / s.to_device + back / s.to_host};
}

std::string describe(const DeviceEstimate& e) {
    return "estimated " + time_text(e.cpu_seconds) + " on the CPU, " + time_text(e.gpu_seconds) +
           " on a GPU with transfers";
}

}  // namespace fastattn
