// Where a call on host arrays is faster, by an estimate that counts the transfers. A pure function of the
// problem and of a few measured speeds; `python -m fastattn tune` measures them.
#pragma once

#include <string>

#include <fastattn/attention.h>

namespace fastattn {

// No transfer to a GPU pays below this, so small calls are spared the estimate.
inline constexpr double kFlopsForGpu = 200e6;

// FLOP/s and bytes/s. The defaults are modest for both sides: a few cores, a data-centre GPU behind PCIe 4.
struct DeviceSpeeds {
    double cpu_per_thread_f64 = 30e9, cpu_per_thread_f32 = 80e9, cpu_per_thread_bf16 = 120e9;
    double gpu_f64 = 8e12, gpu_f32 = 15e12, gpu_half = 150e12;
    double to_device = 8e9, to_host = 8e9;  // staged copies, host memory to host memory included
    double cpu_seconds = 3e-6, gpu_seconds = 150e-6;  // a call that computes nothing
};

// Those in use. Thread-safe; set_device_speeds throws ValueError for a speed that is not above 0.
DeviceSpeeds device_speeds() noexcept;
void set_device_speeds(const DeviceSpeeds& speeds);

struct DeviceEstimate {
    double cpu_seconds = 0.0, gpu_seconds = 0.0;
    bool gpu_is_faster() const noexcept { return gpu_seconds < cpu_seconds; }
};
DeviceEstimate estimate_devices(const AttentionProblem& problem, int threads, const DeviceSpeeds& speeds);
std::string describe(
    const DeviceEstimate& estimate);  // "estimated 3.2 ms on the CPU, 5.1 ms on a GPU with transfers"

}  // namespace fastattn
