// What the parts of the emulated GPU share: its lock, its queues, injected failures.
#pragma once

#include <functional>
#include <mutex>

#include "cuda/simt/runtime.h"

namespace fastattn::emulator {

using Lock = std::lock_guard<std::recursive_mutex>;
// Guards all state, and is held while queued work runs: kernels of two host threads never run at once, which
// their static __shared__ arrays rely on.
std::recursive_mutex& mutex();

[[noreturn]] void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Counts a call and returns the code that fail_next() asked for, mostly 0.
int injected(const char* function);
void set_last_error(int code);

int device_of_thread();  // not a call that counts
// CUDA refuses kernels and products in a stream of another device than the current one.
bool on_current_device(cuda::Stream stream);
void enqueue(cuda::Stream stream, std::function<void()> work);

void set_threads_reversed_locked(bool reversed);
void reset_cublas();

// CUDA's error codes that the emulator gives beyond those of runtime.h.
inline constexpr int kInvalidArgument = 1;
inline constexpr int kInvalidConfiguration = 9;
inline constexpr int kInvalidDevice = 101;
inline constexpr int kInvalidHandle = 400;

}  // namespace fastattn::emulator
