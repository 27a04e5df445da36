// The CUDA room of a build without CUDA: the same symbols; its kernels are listed, with the reason why not.
#include "core/cuda_room.h"
#include "core/kernel.h"
#include "cuda/host/build_info.h"

namespace fastattn {
namespace {

constexpr DType kAllDtypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};
constexpr DType kHalfDtypes[] = {DType::f16, DType::bf16};

constexpr Kernel absent(const char* name, std::span<const DType> dtypes) {
    return {.name = name,
            .device = DeviceType::cuda,
            .dtypes = dtypes,
            .unavailable = &cuda_unavailable,
            .forward = {}};
}

constexpr Kernel kKernels[] = {
#define FASTATTN_CUDA_KERNEL(name, type, dtypes) absent(name, dtypes),
#include "cuda/kernels.inc"
#undef FASTATTN_CUDA_KERNEL
};

}  // namespace

std::span<const Kernel> cuda_kernels() { return kKernels; }

const char* cuda_unavailable() {
    static const std::string reason =
        std::string("this build of fastattn has no CUDA kernels: ") + cuda::build_info();
    return reason.c_str();
}

int cuda_device_count() { return 0; }

const char* cuda_build() { return cuda::build_info(); }
bool cuda_needs_library() { return false; }
void cuda_offer_library(const char*) {}
void* cuda_own_stream(int) { throw UnsupportedError(cuda_unavailable()); }
void cuda_wait(int, void*) { throw UnsupportedError(cuda_unavailable()); }
std::shared_ptr<std::byte> cuda_allocate(int, std::size_t, const char*) {
    throw UnsupportedError(cuda_unavailable());
}

}  // namespace fastattn
