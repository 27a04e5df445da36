// What core asks of the CUDA room beside its kernels; no_cuda.cpp answers where there is none.
#include "core/cuda_room.h"

#include "core/kernel.h"
#include "cuda/blas/library.h"
#include "cuda/host/build_info.h"
#include "cuda/host/context.h"
#include "cuda/host/errors.h"

namespace fastattn {
namespace {

const cuda::DeviceContext& usable(int device) {
    if (const char* why = cuda_unavailable()) cuda::throw_unavailable(why);
    return cuda::context(device);
}

}  // namespace

const char* cuda_unavailable() {
    const char* const why = cuda::unavailable();
    return why != nullptr ? why : cuda::cublas::missing();
}

int cuda_device_count() { return cuda_unavailable() != nullptr ? 0 : cuda::device_count(); }
const char* cuda_build() { return cuda::build_info(); }
bool cuda_needs_library() { return cuda::unavailable() == nullptr && !cuda::cublas::is_open(); }
void cuda_offer_library(const char* path) { cuda::cublas::offer(path); }
void* cuda_own_stream(int device) { return usable(device).own_stream; }

void cuda_wait(int device, void* stream) {
    const cuda::CurrentDevice current(device);
    cuda::throw_on_error(cuda::runtime::synchronize(stream), "computing on the device");
}

std::shared_ptr<std::byte> cuda_allocate(int device, std::size_t bytes, const char* what_for) {
    usable(device);
    const cuda::CurrentDevice current(device);
    void* data = nullptr;
    cuda::throw_on_error(cuda::runtime::allocate_plain(&data, bytes > 0 ? bytes : 1), what_for, bytes);
    // Whoever took the array may have queued work with it: hence not memory of a stream.
    return {static_cast<std::byte*>(data), [](std::byte* p) { cuda::runtime::release_plain(p); }};
}

}  // namespace fastattn
