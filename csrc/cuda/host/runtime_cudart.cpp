// runtime.h by cudart, linked statically: it loads on machines without a driver, and says so when asked.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda/simt/runtime.h"
#include "cuda/simt/tile_map.h"

namespace fastattn::cuda::runtime {
namespace {

cudaStream_t stream_of(Stream stream) noexcept { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(Event event) noexcept { return static_cast<cudaEvent_t>(event); }

// The run time also remembers a failed call as the last error, where a later launch would find it.
int forget(cudaError_t status) noexcept {
    if (status != cudaSuccess) (void)cudaGetLastError();
    return static_cast<int>(status);
}

int attribute(cudaDeviceAttr which, int device, int* value) noexcept {
    return forget(cudaDeviceGetAttribute(value, which, device));
}

}  // namespace

int driver_version(int* version) noexcept { return forget(cudaDriverGetVersion(version)); }
int runtime_version(int* version) noexcept { return forget(cudaRuntimeGetVersion(version)); }
int device_count(int* count) noexcept { return forget(cudaGetDeviceCount(count)); }

int properties(int device, DeviceProperties* to) noexcept {
    cudaDeviceProp all;
    if (const int status = forget(cudaGetDeviceProperties(&all, device))) return status;
    *to = {};
    std::memcpy(to->name, all.name, std::min(sizeof to->name, sizeof all.name));
    to->name[sizeof to->name - 1] = '\0';
    to->major = all.major;
    to->minor = all.minor;
    to->multiprocessors = std::max(1, all.multiProcessorCount);
    to->l2_bytes = static_cast<std::size_t>(std::max(0, all.l2CacheSize));
    return 0;
}

int current_device(int* device) noexcept { return forget(cudaGetDevice(device)); }
int set_device(int device) noexcept { return forget(cudaSetDevice(device)); }

int create_pool(int device, std::size_t kept_bytes, Pool* pool) noexcept {
    int supported = 0;
    if (const int status = attribute(cudaDevAttrMemoryPoolsSupported, device, &supported)) return status;
    if (supported == 0) return static_cast<int>(cudaErrorNotSupported);
    cudaMemPoolProps wanted = {};
    wanted.allocType = cudaMemAllocationTypePinned;
    wanted.handleTypes = cudaMemHandleTypeNone;
    wanted.location.type = cudaMemLocationTypeDevice;
    wanted.location.id = device;
    cudaMemPool_t fresh = nullptr;
    if (const int status = forget(cudaMemPoolCreate(&fresh, &wanted))) return status;
    std::uint64_t kept = kept_bytes;
    if (const int status = forget(cudaMemPoolSetAttribute(fresh, cudaMemPoolAttrReleaseThreshold, &kept))) {
        (void)cudaMemPoolDestroy(fresh);
        return status;
    }
    *pool = fresh;
    return 0;
}

int allocate(void** data, std::size_t bytes, Pool pool, Stream stream) noexcept {
    return forget(cudaMallocFromPoolAsync(data, bytes, static_cast<cudaMemPool_t>(pool), stream_of(stream)));
}

int release(void* data, Stream stream) noexcept { return forget(cudaFreeAsync(data, stream_of(stream))); }
int allocate_plain(void** data, std::size_t bytes) noexcept { return forget(cudaMalloc(data, bytes)); }
int release_plain(void* data) noexcept { return forget(cudaFree(data)); }
int allocate_pinned(void** data, std::size_t bytes) noexcept {
    return forget(cudaHostAlloc(data, bytes, cudaHostAllocPortable));
}
int release_pinned(void* data) noexcept { return forget(cudaFreeHost(data)); }

int copy(void* target, const void* source, std::size_t bytes, Copy kind, Stream stream) noexcept {
    const cudaMemcpyKind kinds[] = {cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost};
    return forget(cudaMemcpyAsync(target, source, bytes, kinds[static_cast<int>(kind)], stream_of(stream)));
}

int free_host_after(void* data, Stream stream) noexcept {
    return forget(cudaLaunchHostFunc(stream_of(stream), [](void* memory) { std::free(memory); }, data));
}

namespace {

// cuTensorMapEncodeTiled, a function of the driver: its parameters by their sizes, its enumerations by their
// values (check_cuda_codes.cpp compares them with NVIDIA's header).
using EncodeTiled = int (*)(void* map, int type, unsigned rank, void* data, const std::uint64_t* size,
                            const std::uint64_t* stride, const unsigned* box, const unsigned* step,
                            int interleave, int swizzle, int promotion, int fill);

}  // namespace

int encode_tile_map(const TileMapLayout& layout, TensorMap* map) noexcept {
    static std::atomic<void*> known{nullptr};
    void* function = known.load(std::memory_order_acquire);
    if (function == nullptr) {
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const int status = forget(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                                   cudaEnableDefault, &found));
#else
        const int status =
            forget(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
        if (status != 0) return status;
        if (found != cudaDriverEntryPointSuccess) return kNotSupported;
        known.store(function, std::memory_order_release);
    }
    const unsigned box[4] = {64, layout.rows, 1, 1}, step[4] = {1, 1, 1, 1};
    return reinterpret_cast<EncodeTiled>(function)(
        map, layout.bf16 ? tile_map_codes::kBf16 : tile_map_codes::kF16, 4, layout.data, layout.size,
        layout.stride, box, step, tile_map_codes::kNoInterleave, tile_map_codes::kSwizzle128,
        tile_map_codes::kPromote256, tile_map_codes::kFillZeros);
}

int create_stream(Stream* stream) noexcept {
    cudaStream_t fresh = nullptr;
    const int status = forget(cudaStreamCreateWithFlags(&fresh, cudaStreamNonBlocking));
    *stream = fresh;
    return status;
}

int destroy_stream(Stream stream) noexcept { return forget(cudaStreamDestroy(stream_of(stream))); }
int synchronize(Stream stream) noexcept { return forget(cudaStreamSynchronize(stream_of(stream))); }

int is_capturing(Stream stream, bool* capturing) noexcept {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const int failed = forget(cudaStreamIsCapturing(stream_of(stream), &status));
    *capturing = status != cudaStreamCaptureStatusNone;
    return failed;
}

int create_event(Event* event) noexcept {
    cudaEvent_t fresh = nullptr;
    const int status = forget(cudaEventCreateWithFlags(&fresh, cudaEventDisableTiming));
    *event = fresh;
    return status;
}

int destroy_event(Event event) noexcept { return forget(cudaEventDestroy(event_of(event))); }
int record(Event event, Stream stream) noexcept {
    return forget(cudaEventRecord(event_of(event), stream_of(stream)));
}
int wait(Stream stream, Event event) noexcept {
    return forget(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0));
}

int query(Event event) noexcept {
    const cudaError_t status = cudaEventQuery(event_of(event));
    return status == cudaErrorNotReady ? static_cast<int>(status) : forget(status);
}

int last_error() noexcept { return static_cast<int>(cudaGetLastError()); }
const char* error_name(int code) noexcept { return cudaGetErrorName(static_cast<cudaError_t>(code)); }
const char* error_text(int code) noexcept { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace fastattn::cuda::runtime
