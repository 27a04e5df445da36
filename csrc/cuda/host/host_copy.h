// Copies between strided arrays of the host, spread over the threads of a call.
#pragma once

#include <array>
#include <cstdint>

#include "threads/executor.h"

namespace fastattn::cuda {

// Four axes, outermost first; strides in bytes.
struct HostArray {
    char* data = nullptr;
    std::array<std::int64_t, 4> stride{};
};

// target[...] = source[...] for elements of `item` bytes (1, 2, 4 or 8).
void copy_host(const HostArray& source, const HostArray& target, const std::array<std::int64_t, 4>& size,
               std::int64_t item, Executor& executor);

}  // namespace fastattn::cuda
