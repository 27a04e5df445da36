// The memory that dispatch hands to a kernel for one call.
#pragma once

#include <cstddef>

namespace fastattn {

// 64-byte aligned bytes, uninitialised. Up to kCachedBytes the block stays with the thread and serves
// its next call; a larger one is freed at once. Throws OutOfMemory.
class WorkspaceMemory {
public:
    static constexpr std::size_t kAlignment = 64;
    static constexpr std::size_t kCachedBytes = std::size_t{64} << 20;

    explicit WorkspaceMemory(std::size_t bytes);
    ~WorkspaceMemory();
    WorkspaceMemory(const WorkspaceMemory&) = delete;
    WorkspaceMemory& operator=(const WorkspaceMemory&) = delete;

    std::byte* data() const noexcept { return data_; }

private:
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace fastattn
