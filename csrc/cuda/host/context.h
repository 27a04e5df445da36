// What is known of the CUDA devices of this process: probed once, at the first question; never while
// importing.
#pragma once

#include <cstddef>

#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

// Freed memory that a device's pool keeps for the next call.
inline constexpr std::size_t kPoolBytes = std::size_t{256} << 20;

struct DeviceContext {
    int index = 0;
    DeviceProperties properties;
    Pool pool = nullptr;
    Stream own_stream = nullptr;  // for callers without one
};

// Why no CUDA device can be used, or nullptr. Thread-safe; the answer is kept.
const char* unavailable() noexcept;
[[noreturn]] void throw_unavailable(const char* why);
int device_count() noexcept;  // 0 when unavailable
// The context of a device below device_count(), made at the first call; throws UnsupportedError or CudaError.
const DeviceContext& context(int device);

// Makes a device the thread's current one, and puts back what was.
class CurrentDevice {
public:
    explicit CurrentDevice(int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

// Device memory of one call, taken and given back in the order of its stream.
class DeviceMemory {
public:
    // Throws OutOfMemory. 0 bytes: nothing.
    DeviceMemory(const DeviceContext& context, std::size_t bytes, Stream stream, const char* what_for);
    ~DeviceMemory();
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    std::byte* data() const noexcept { return data_; }

private:
    std::byte* data_ = nullptr;
    Stream stream_;
};

// What a piece of a block takes, so that the next one is aligned.
constexpr std::size_t carved(std::size_t bytes) noexcept { return (bytes + 255) / 256 * 256; }
// Consecutive 256-byte aligned pieces of a block; with a null block it only counts.
class Carver {
public:
    explicit Carver(std::byte* block) noexcept : block_(block) {}
    std::byte* take(std::size_t bytes) noexcept {
        std::byte* piece = block_ == nullptr ? nullptr : block_ + used_;
        used_ += carved(bytes);
        return piece;
    }
    std::size_t used() const noexcept { return used_; }

private:
    std::byte* block_;
    std::size_t used_ = 0;
};

}  // namespace fastattn::cuda
