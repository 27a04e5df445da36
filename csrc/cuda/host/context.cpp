#include "cuda/host/context.h"

#include <algorithm>
#include <atomic>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <fastattn/attention.h>

#include "core/cuda_room.h"
#include "core/kernel.h"
#include "cuda/blas/errors.h"
#include "cuda/host/build_info.h"

namespace fastattn::cuda {
namespace {

constexpr int kOldestCapability = 75;  // Turing: the first for which CUDA 13 compiles

long process_id() noexcept {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

struct Devices {
    std::mutex mutex;
    bool probed = false;
    std::string reason;  // empty: usable
    std::list<std::string> library_reasons;
    const cublas::Table* blas = nullptr;
    int count = 0;
    std::vector<std::unique_ptr<DeviceContext>> contexts;
    std::vector<std::unique_ptr<GemmPlans>> plans;
};

// Never destroyed: the driver may be gone before static destructors run.
Devices& devices() {
    static auto* const all = new Devices;
    return *all;
}

// The process that started the driver, 0 before; CUDA does not survive fork().
std::atomic<long> started_in{0};

bool is_forked() noexcept {
    const long owner = started_in.load(std::memory_order_acquire);
    return owner != 0 && owner != process_id();
}

constexpr const char* kForked =
    "CUDA was started before this process was forked, and does not work in a child (use the start method "
    "\"spawn\")";

std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Empty when the device is new enough.
std::string too_old(int device, const DeviceProperties& is) {
    if (is.major * 10 + is.minor >= kOldestCapability) return {};
    return "cuda:" + std::to_string(device) + ", " + is.name + ", has compute capability " +
           std::to_string(is.major) + "." + std::to_string(is.minor) + "; 7.5 or newer is needed";
}

std::string find_devices(Devices& all) {
    int driver = 0, built = 0;
    if (runtime::driver_version(&driver) != 0 || driver == 0)
        return "no NVIDIA driver is installed on this machine";
    const int failed = runtime::runtime_version(&built);
    if (failed == 0 && driver < built / 1000 * 1000)
        return "the NVIDIA driver supports CUDA " + version_text(driver) + ", this build needs " +
               version_text(built / 1000 * 1000) + " or newer";
    // Before the driver starts: a thread may fork meanwhile, and its child would wait for the mutex for ever.
    started_in.store(process_id(), std::memory_order_release);
    const int status = runtime::device_count(&all.count);
    if (status == kNoDevice || (status == 0 && all.count == 0))
        return "no CUDA device is visible to this process";
    if (status != 0)
        return std::string("the CUDA driver cannot be started: ") + runtime::error_name(status) + " (" +
               runtime::error_text(status) + ")";
    DeviceProperties first;
    if (all.count == 1 && runtime::properties(0, &first) == 0) return too_old(0, first);
    return {};
}

std::string open_library(Devices& all) {
    const char* why = nullptr;
    all.blas = cublas::open(&why);
    return all.blas == nullptr ? why : "";
}

void probe_devices(Devices& all) {
    if (!all.probed) all.reason = find_devices(all);
    all.probed = true;
}

// Under the mutex. What it returns lives on, though another thread may ask again.
const std::string& probe(Devices& all) {
    probe_devices(all);
    if (all.reason.empty() && all.blas == nullptr) {
        const std::string reason = open_library(all);
        if (reason.empty()) return all.reason;
        const auto known = std::find(all.library_reasons.begin(), all.library_reasons.end(), reason);
        return known != all.library_reasons.end() ? *known : all.library_reasons.emplace_back(reason);
    }
    return all.reason;
}

}  // namespace

const char* unavailable() noexcept {
    if (is_forked()) return kForked;
    Devices& all = devices();
    const std::lock_guard lock(all.mutex);
    const std::string& reason = probe(all);
    return reason.empty() ? nullptr : reason.c_str();
}

bool needs_library() noexcept {
    if (is_forked()) return false;
    Devices& all = devices();
    const std::lock_guard lock(all.mutex);
    probe_devices(all);
    return all.reason.empty() && all.blas == nullptr;
}

int usable_devices() noexcept {
    if (unavailable() != nullptr) return 0;
    return devices().count;
}

const DeviceContext& context(int device) {
    if (const char* reason = unavailable())
        throw UnsupportedError(std::string("device: CUDA cannot be used: ") + reason);
    Devices& all = devices();
    const std::lock_guard lock(all.mutex);
    for (const auto& known : all.contexts)
        if (known->index == device) return *known;
    const CurrentDevice current(device);
    auto fresh = std::make_unique<DeviceContext>();
    fresh->index = device;
    throw_on_error(runtime::properties(device, &fresh->properties), "asking for the device's properties");
    if (const std::string reason = too_old(device, fresh->properties); !reason.empty())
        throw UnsupportedError("device: " + reason);
    throw_on_error(runtime::create_pool(device, kPoolBytes, &fresh->pool), "making a memory pool");
    cublas::Handle handle = nullptr;
    throw_on_status(*all.blas, all.blas->Create(&handle), "starting the library");
    throw_on_error(runtime::create_stream(&fresh->own_stream), "making a stream");
    all.plans.push_back(std::make_unique<GemmPlans>(*all.blas, handle, kGemmWorkspaceBytes));
    fresh->gemm = all.plans.back().get();
    all.contexts.push_back(std::move(fresh));
    return *all.contexts.back();
}

CurrentDevice::CurrentDevice(int device) {
    throw_on_error(runtime::current_device(&before_), "asking for the current device");
    if (before_ == device) return;
    throw_on_error(runtime::set_device(device), "choosing a device");
    changed_ = true;
}

CurrentDevice::~CurrentDevice() {
    if (changed_) runtime::set_device(before_);
}

DeviceMemory::DeviceMemory(const DeviceContext& context, std::size_t bytes, Stream stream,
                           const char* what_for)
    : stream_(stream) {
    if (bytes == 0) return;
    void* data = nullptr;
    throw_on_error(runtime::allocate(&data, bytes, context.pool, stream), what_for, bytes);
    data_ = static_cast<std::byte*>(data);
}

DeviceMemory::~DeviceMemory() {
    if (data_ != nullptr) runtime::release(data_, stream_);
}

}  // namespace fastattn::cuda

namespace fastattn {

const char* cuda_unavailable() { return cuda::unavailable(); }
int cuda_device_count() { return cuda::usable_devices(); }
const char* cuda_build() { return cuda::build_info(); }
bool cuda_needs_library() { return cuda::needs_library(); }
void cuda_offer_library(const char* path) { cuda::cublas::offer(path); }
void* cuda_own_stream(int device) { return cuda::context(device).own_stream; }

void cuda_wait(int device, void* stream) {
    const cuda::CurrentDevice current(device);
    cuda::throw_on_error(cuda::runtime::synchronize(stream), "computing on the device");
}

std::shared_ptr<std::byte> cuda_allocate(int device, std::size_t bytes, const char* what_for) {
    cuda::context(device);
    const cuda::CurrentDevice current(device);
    void* data = nullptr;
    cuda::throw_on_error(cuda::runtime::allocate_plain(&data, bytes > 0 ? bytes : 1), what_for, bytes);
    // Whoever took the array may have queued work with it: hence not memory of a stream.
    return {static_cast<std::byte*>(data), [](std::byte* p) { cuda::runtime::release_plain(p); }};
}

}  // namespace fastattn
