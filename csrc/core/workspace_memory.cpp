#include "core/workspace_memory.h"

#include <cstdlib>
#include <limits>
#include <utility>

#include <fastattn/attention.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

void release(std::byte* data) noexcept { std::free(data); }

// From a quarter of a huge page on whole ones: a packed tile is walked in strides that would use up the TLB.
std::byte* allocate(std::size_t& bytes) noexcept {
    std::size_t alignment = WorkspaceMemory::kAlignment;
    if (bytes >= kHugePage / 4 && bytes <= std::numeric_limits<std::size_t>::max() - kHugePage)
        alignment = kHugePage;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    void* data = nullptr;
    if (posix_memalign(&data, alignment, bytes) != 0) return nullptr;
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // only advice
#endif
    return static_cast<std::byte*>(data);
}

// A call takes the block out and puts it back, so that a call within a call (a signal handler run by
// the poll function) gets a block of its own.
struct Cache {
    std::byte* data = nullptr;
    std::size_t bytes = 0;
    ~Cache() { release(data); }
};
thread_local Cache cache;

}  // namespace

WorkspaceMemory::WorkspaceMemory(std::size_t bytes) {
    if (bytes == 0) return;
    if (cache.bytes >= bytes) {
        data_ = std::exchange(cache.data, nullptr);
        bytes_ = std::exchange(cache.bytes, 0);
        return;
    }
    if (bytes <= kCachedBytes) {  // the small block would be replaced at the end of this call anyway
        release(std::exchange(cache.data, nullptr));
        cache.bytes = 0;
    }
    bytes_ = bytes;
    data_ = allocate(bytes_);
    if (data_ == nullptr) throw OutOfMemory("the workspace", bytes);
}

WorkspaceMemory::~WorkspaceMemory() {
    if (bytes_ <= kCachedBytes && bytes_ > cache.bytes) {
        std::swap(data_, cache.data);
        cache.bytes = bytes_;
    }
    release(data_);
}

}  // namespace fastattn
