#include "cuda/host/context.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <fastattn/attention.h>

#include "cuda/host/errors.h"

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
    int count = 0;
    std::vector<std::unique_ptr<DeviceContext>> contexts;
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

}  // namespace

const char* unavailable() noexcept {
    if (is_forked()) return kForked;
    Devices& all = devices();
    const std::lock_guard lock(all.mutex);
    if (!all.probed) all.reason = find_devices(all);
    all.probed = true;
    return all.reason.empty() ? nullptr : all.reason.c_str();
}

void throw_unavailable(const char* why) {
    throw UnsupportedError(std::string("device: CUDA cannot be used: ") + why);
}

int device_count() noexcept { return unavailable() != nullptr ? 0 : devices().count; }

const DeviceContext& context(int device) {
    if (const char* why = unavailable()) throw_unavailable(why);
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
    throw_on_error(runtime::create_stream(&fresh->own_stream), "making a stream");
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
