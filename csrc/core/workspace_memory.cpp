#include "core/workspace_memory.h"

#include <new>
#include <utility>

#include <fastattn/attention.h>

namespace fastattn {
namespace {

constexpr std::align_val_t kAlign{WorkspaceMemory::kAlignment};

void release(std::byte* data) noexcept { ::operator delete(data, kAlign); }

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
    data_ = static_cast<std::byte*>(::operator new(bytes, kAlign, std::nothrow));
    if (data_ == nullptr) throw OutOfMemory("the workspace", bytes);
    bytes_ = bytes;
}

WorkspaceMemory::~WorkspaceMemory() {
    if (bytes_ <= kCachedBytes && bytes_ > cache.bytes) {
        std::swap(data_, cache.data);
        cache.bytes = bytes_;
    }
    release(data_);
}

}  // namespace fastattn
