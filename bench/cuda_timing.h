// What bench_attention needs of CUDA: cuda_timing.cpp has it, no_cuda_timing.cpp says that this build has
// none.
#pragma once

#include <cstddef>
#include <functional>

namespace bench::cuda {

// Makes `device` the current one; throws std::runtime_error where it cannot be used.
void use_device(int device);

// Memory of the current device.
class Memory {
public:
    Memory(const void* source, std::size_t bytes);  // a copy
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    void* data() const noexcept { return data_; }

private:
    void* data_ = nullptr;
};

// Seconds on the device, between two events in the default stream around what `queue` puts there.
double seconds(const std::function<void()>& queue);

}  // namespace bench::cuda
