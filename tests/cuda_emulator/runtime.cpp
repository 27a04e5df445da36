// csrc/cuda/simt/runtime.h on this machine's memory. Streams are lazy: work runs only when someone waits for
// it, and then no more of it than the rules of streams and events demand. So host code that forgets to wait,
// frees too early or reuses a buffer sees it in every run, not in one of a thousand.
#include "cuda/simt/runtime.h"
#include "cuda/simt/tile_map.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "emulator.h"
#include "state.h"

namespace fastattn::emulator {
namespace {

// Both ends of a block: all of a large one would take most of a test's time.
void poison(void* data, std::size_t bytes, int byte) {
    const std::size_t end = std::min(bytes, std::size_t{1} << 20);
    std::memset(data, byte, end);
    std::memset(static_cast<char*>(data) + (bytes - end), byte, end);
}

struct Queue {
    int device = 0;
    std::deque<std::function<void()>> work;
};

// One recording of an event: waiters keep the one they saw, whatever becomes of the event.
struct Mark {
    std::shared_ptr<Queue> queue;
    bool reached = false;
};

struct EventState {
    int device = 0;
    std::shared_ptr<Mark> mark;
};

struct PoolState {
    int device = 0;
};

struct Allocation {
    std::size_t bytes = 0;
    int device = 0;
    bool released = false;
};

struct Failure {
    std::string function;
    int code = 0;
    std::size_t after = 0;
};

struct Settings {
    bool capturing = false;
    int devices = 2;
    int driver = 13000;
    std::map<int, std::pair<int, int>> capabilities;  // of the devices that are not 9.0
    std::size_t l2_bytes = std::size_t{1} << 20, memory_limit = std::size_t{2} << 30;
};

struct State {
    std::recursive_mutex mutex;
    Settings settings;
    std::unordered_map<void*, std::shared_ptr<Queue>> streams;
    // (per thread?, device, thread)
    std::map<std::tuple<bool, int, std::thread::id>, std::shared_ptr<Queue>> default_streams;
    std::unordered_map<void*, std::unique_ptr<EventState>> events;
    std::set<std::unique_ptr<PoolState>> pools;
    std::unordered_map<void*, Allocation> allocations;
    std::unordered_map<void*, std::size_t> pinned;
    std::map<int, std::size_t> used_bytes;
    std::vector<Failure> failures;
    std::map<std::string, std::size_t> calls;
};

State& state() {
    static State* const the = new State;  // never destroyed: threads may outlive main()
    return *the;
}

thread_local int t_device = 0;
thread_local int t_error = 0;

std::shared_ptr<Queue> queue_of(cuda::Stream stream) {
    const auto number = reinterpret_cast<std::uintptr_t>(stream);
    if (number <= 2) {
        const bool per_thread = number == 2;
        auto& queue = state().default_streams[{per_thread, t_device,
                                               per_thread ? std::this_thread::get_id() : std::thread::id()}];
        if (!queue) queue = std::make_shared<Queue>(Queue{t_device, {}});
        return queue;
    }
    const auto found = state().streams.find(stream);
    if (found == state().streams.end()) die("unknown stream %p", stream);
    return found->second;
}

void run_one(Queue& queue) {
    // Taken out first: a wait inside may run other queues, but never comes back to this operation.
    const std::function<void()> work = std::move(queue.work.front());
    queue.work.pop_front();
    work();
}

void drain(Queue& queue) {
    while (!queue.work.empty()) run_one(queue);
}

void run_until(const Mark& mark) {
    while (!mark.reached) {
        if (mark.queue->work.empty()) die("an event was recorded in a stream that lost the record");
        run_one(*mark.queue);
    }
}

EventState& event_of(cuda::Event event) {
    const auto found = state().events.find(event);
    if (found == state().events.end()) die("unknown event %p", event);
    return *found->second;
}

void* aligned(std::size_t bytes) {
    void* data = nullptr;  // posix_memalign: AddressSanitizer then guards the very last byte
    return posix_memalign(&data, 256, bytes) == 0 ? data : nullptr;
}

}  // namespace

std::recursive_mutex& mutex() { return state().mutex; }

void die(const char* format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::fputs("emulated GPU: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    std::fflush(stderr);
    std::abort();
}

int injected(const char* function) {
    const Lock lock(mutex());
    ++state().calls[function];
    ++state().calls["*"];
    auto& failures = state().failures;
    int code = 0;
    for (std::size_t i = 0; i < failures.size();) {
        Failure& failure = failures[i];
        if (failure.function != function && failure.function != "*") {
            ++i;
        } else if (failure.after > 0) {
            --failure.after;
            ++i;
        } else if (code == 0) {
            code = failure.code;
            failures.erase(failures.begin() + static_cast<std::ptrdiff_t>(i));
        } else {
            ++i;  // one failure for each call
        }
    }
    return code;
}

void set_last_error(int code) { t_error = code; }

int device_of_thread() { return t_device; }

bool on_current_device(cuda::Stream stream) {
    const Lock lock(mutex());
    return queue_of(stream)->device == t_device;
}

void enqueue(cuda::Stream stream, std::function<void()> work) {
    const Lock lock(mutex());
    queue_of(stream)->work.push_back(std::move(work));
}

// ---- control ----------------------------------------------------------------------------------------------

void set_device_count(int count) {
    const Lock lock(mutex());
    state().settings.devices = count;
}
void set_driver_version(int version) {
    const Lock lock(mutex());
    state().settings.driver = version;
}
void set_compute_capability(int device, int major, int minor) {
    const Lock lock(mutex());
    state().settings.capabilities[device] = {major, minor};
}
void set_l2_bytes(std::size_t bytes) {
    const Lock lock(mutex());
    state().settings.l2_bytes = bytes;
}
void set_capturing(bool capturing) {
    const Lock lock(mutex());
    state().settings.capturing = capturing;
}

void set_memory_limit(std::size_t bytes) {
    const Lock lock(mutex());
    state().settings.memory_limit = bytes;
}
void set_threads_reversed(bool reversed) {
    const Lock lock(mutex());
    set_threads_reversed_locked(reversed);
}

namespace {
std::atomic<bool> g_copies_eager{false};
}  // namespace
void set_copies_eager(bool eager) { g_copies_eager = eager; }
bool copies_eager() { return g_copies_eager; }

void fail_next(const char* function, int code, std::size_t after) {
    const Lock lock(mutex());
    state().failures.push_back({function, code, after});
}

void reset() {
    const Lock lock(mutex());
    synchronize_all();
    state().settings = {};
    state().failures.clear();
    state().calls.clear();
    set_threads_reversed_locked(false);
    g_copies_eager = false;
    reset_cublas();
}

void synchronize_all() {
    const Lock lock(mutex());
    for (const auto& [key, queue] : state().default_streams) drain(*queue);
    for (const auto& [handle, queue] : state().streams) drain(*queue);
}

std::size_t live_allocations() {
    const Lock lock(mutex());
    return state().allocations.size();
}
std::size_t live_pinned() {
    const Lock lock(mutex());
    return state().pinned.size();
}
std::size_t live_streams() {
    const Lock lock(mutex());
    return state().streams.size();
}
std::size_t live_events() {
    const Lock lock(mutex());
    return state().events.size();
}

std::size_t pending() {
    const Lock lock(mutex());
    std::size_t count = 0;
    for (const auto& [key, queue] : state().default_streams) count += queue->work.size();
    for (const auto& [handle, queue] : state().streams) count += queue->work.size();
    return count;
}

std::size_t calls(const char* function) {
    const Lock lock(mutex());
    const auto found = state().calls.find(function);
    return found == state().calls.end() ? 0 : found->second;
}

std::size_t heuristic_calls() { return calls("MatmulAlgoGetHeuristic"); }

}  // namespace fastattn::emulator

// ---- runtime.h --------------------------------------------------------------------------------------------

namespace fastattn::cuda::runtime {

using namespace emulator;

namespace {

// No driver and no device are found before anything else, as in CUDA.
int missing_device() {
    const Settings& settings = state().settings;
    if (settings.driver == 0) return kInsufficientDriver;
    return settings.devices == 0 ? kNoDevice : 0;
}

bool is_device(int device) { return device >= 0 && device < state().settings.devices; }

}  // namespace

// Each function: the lock, then the failure that a test asked for.
#define FASTATTN_ENTER(name)         \
    const Lock lock_of_gpu(mutex()); \
    if (const int code_asked_for = injected(name)) return code_asked_for

int driver_version(int* version) noexcept {
    FASTATTN_ENTER("driver_version");
    *version = state().settings.driver;
    return 0;
}

int runtime_version(int* version) noexcept {
    FASTATTN_ENTER("runtime_version");
    *version = 13000;
    return 0;
}

int device_count(int* count) noexcept {
    *count = 0;
    FASTATTN_ENTER("device_count");
    if (const int code = missing_device()) return code;
    *count = state().settings.devices;
    return 0;
}

int properties(int device, DeviceProperties* properties) noexcept {
    FASTATTN_ENTER("properties");
    if (const int code = missing_device()) return code;
    if (!is_device(device)) return kInvalidDevice;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "emulated GPU (tests only)");
    const auto& set = state().settings.capabilities;
    const auto [major, minor] = set.contains(device) ? set.at(device) : std::pair{9, 0};
    properties->major = major;
    properties->minor = minor;
    properties->multiprocessors = 3;  // few: blocks that stay for a whole launch then take several tiles
    properties->l2_bytes = state().settings.l2_bytes;
    return 0;
}

int current_device(int* device) noexcept {
    FASTATTN_ENTER("current_device");
    if (const int code = missing_device()) return code;
    *device = t_device;
    return 0;
}

int set_device(int device) noexcept {
    FASTATTN_ENTER("set_device");
    if (const int code = missing_device()) return code;
    if (!is_device(device)) return kInvalidDevice;
    t_device = device;
    return 0;
}

int create_pool(int device, std::size_t, Pool* pool) noexcept {
    FASTATTN_ENTER("create_pool");
    if (!is_device(device)) return kInvalidDevice;
    auto made = std::make_unique<PoolState>(PoolState{device});
    *pool = made.get();
    state().pools.insert(std::move(made));
    return 0;
}

int allocate(void** data, std::size_t bytes, Pool pool, Stream stream) noexcept {
    FASTATTN_ENTER("allocate");
    queue_of(stream);
    const PoolState* owner = nullptr;
    for (const auto& known : state().pools) {
        if (known.get() == pool) owner = known.get();
    }
    if (owner == nullptr) die("allocate: unknown pool %p", pool);
    if (bytes == 0) return kInvalidArgument;
    std::size_t& used = state().used_bytes[owner->device];
    const std::size_t limit = state().settings.memory_limit;
    if (bytes > limit || used > limit - bytes) return kNoMemory;
    void* const memory = aligned(bytes);
    if (memory == nullptr) return kNoMemory;
    poison(memory, bytes, 0xFF);  // NaN in every type
    used += bytes;
    state().allocations[memory] = {bytes, owner->device, false};
    *data = memory;
    return 0;
}

int release(void* data, Stream stream) noexcept {
    FASTATTN_ENTER("release");
    const auto found = state().allocations.find(data);
    if (found == state().allocations.end() || found->second.released) return kInvalidArgument;
    found->second.released = true;
    // The limit counts as CUDA's pools do: what a stream has freed, later allocations in it may have.
    state().used_bytes[found->second.device] -= found->second.bytes;
    queue_of(stream)->work.emplace_back([data, bytes = found->second.bytes] {
        poison(data, bytes, 0xCD);
        state().allocations.erase(data);
        std::free(data);
    });
    return 0;
}

int allocate_plain(void** data, std::size_t bytes) noexcept {
    FASTATTN_ENTER("allocate_plain");
    if (const int code = missing_device()) return code;
    if (bytes == 0) return kInvalidArgument;
    void* const memory = aligned(bytes);
    if (memory == nullptr) return kNoMemory;
    poison(memory, bytes, 0xFF);
    state().allocations[memory] = {bytes, t_device, true};
    *data = memory;
    return 0;
}

// Waits, as cudaFree does for memory of cudaMalloc.
int release_plain(void* data) noexcept {
    FASTATTN_ENTER("release_plain");
    const auto found = state().allocations.find(data);
    if (found == state().allocations.end()) return kInvalidArgument;
    emulator::synchronize_all();
    poison(data, found->second.bytes, 0xCD);
    state().allocations.erase(found);
    std::free(data);
    return 0;
}

int allocate_pinned(void** data, std::size_t bytes) noexcept {
    FASTATTN_ENTER("allocate_pinned");
    if (bytes == 0) return kInvalidArgument;
    void* const memory = aligned(bytes);
    if (memory == nullptr) return kNoMemory;
    poison(memory, bytes, 0xFF);
    state().pinned[memory] = bytes;
    *data = memory;
    return 0;
}

// Does not wait: a copy that is still queued is a use after free, for AddressSanitizer to find.
int release_pinned(void* data) noexcept {
    FASTATTN_ENTER("release_pinned");
    if (data == nullptr) return 0;
    const auto found = state().pinned.find(data);
    if (found == state().pinned.end()) return kInvalidArgument;
    poison(data, found->second, 0xCD);
    state().pinned.erase(found);
    std::free(data);
    return 0;
}

int copy(void* target, const void* source, std::size_t bytes, Copy, Stream stream) noexcept {
    FASTATTN_ENTER("copy");
    const auto queue = queue_of(stream);
    if (bytes == 0) return 0;
    if (target == nullptr || source == nullptr) return kInvalidArgument;
    queue->work.emplace_back([=] { std::memcpy(target, source, bytes); });
    return 0;
}

int free_host_after(void* data, Stream stream) noexcept {
    FASTATTN_ENTER("free_host_after");
    queue_of(stream)->work.emplace_back([=] { std::free(data); });
    return 0;
}

int is_capturing(Stream stream, bool* capturing) noexcept {
    FASTATTN_ENTER("is_capturing");
    queue_of(stream);
    *capturing = state().settings.capturing;
    return 0;
}

int create_stream(Stream* stream) noexcept {
    FASTATTN_ENTER("create_stream");
    if (const int code = missing_device()) return code;
    auto queue = std::make_shared<Queue>(Queue{t_device, {}});
    *stream = queue.get();
    state().streams[queue.get()] = queue;
    return 0;
}

int destroy_stream(Stream stream) noexcept {
    FASTATTN_ENTER("destroy_stream");
    if (reinterpret_cast<std::uintptr_t>(stream) <= 2) return kInvalidHandle;
    drain(*queue_of(stream));
    state().streams.erase(stream);
    return 0;
}

int synchronize(Stream stream) noexcept {
    FASTATTN_ENTER("synchronize");
    drain(*queue_of(stream));
    return 0;
}

// hopper_shim.h reads it back. What the driver refuses is refused.
int encode_tile_map(const TileMapLayout& layout, TensorMap* map) noexcept {
    FASTATTN_ENTER("encode_tile_map");
    bool valid =
        reinterpret_cast<std::uintptr_t>(layout.data) % 16 == 0 && layout.rows >= 1 && layout.rows <= 256;
    for (const std::uint64_t size : layout.size) valid = valid && size >= 1 && size <= std::uint64_t{1} << 32;
    for (const std::uint64_t stride : layout.stride)
        valid = valid && stride % 16 == 0 && stride < std::uint64_t{1} << 40;
    if (!valid) return kInvalidArgument;
    static_assert(sizeof layout <= sizeof map->bytes);
    std::memcpy(map->bytes, &layout, sizeof layout);
    return 0;
}

int create_event(Event* event) noexcept {
    FASTATTN_ENTER("create_event");
    if (const int code = missing_device()) return code;
    auto made = std::make_unique<EventState>(EventState{t_device, nullptr});
    *event = made.get();
    state().events[made.get()] = std::move(made);
    return 0;
}

int destroy_event(Event event) noexcept {
    FASTATTN_ENTER("destroy_event");
    event_of(event);
    state().events.erase(event);
    return 0;
}

int record(Event event, Stream stream) noexcept {
    FASTATTN_ENTER("record");
    EventState& recorded = event_of(event);
    const auto queue = queue_of(stream);
    if (queue->device != recorded.device) return kInvalidHandle;
    const auto mark = std::make_shared<Mark>(Mark{queue, false});
    recorded.mark = mark;
    queue->work.emplace_back([mark] { mark->reached = true; });
    return 0;
}

int wait(Stream stream, Event event) noexcept {
    FASTATTN_ENTER("wait");
    const auto queue = queue_of(stream);
    // An event that was never recorded has happened, says CUDA.
    if (const auto mark = event_of(event).mark) queue->work.emplace_back([mark] { run_until(*mark); });
    return 0;
}

// Never "not ready": who asks is who would wait.
int query(Event event) noexcept {
    FASTATTN_ENTER("query");
    if (const auto mark = event_of(event).mark) run_until(*mark);
    return 0;
}

#undef FASTATTN_ENTER

int last_error() noexcept { return std::exchange(t_error, 0); }

namespace {
struct ErrorText {
    int code;
    const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {0, "cudaSuccess", "no error"},
    {kInvalidArgument, "cudaErrorInvalidValue", "invalid argument"},
    {kNoMemory, "cudaErrorMemoryAllocation", "out of memory"},
    {kInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {kInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {kNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {kInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {kInvalidHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {kNotSupported, "cudaErrorNotSupported", "operation not supported"},
};
}  // namespace

const char* error_name(int code) noexcept {
    for (const ErrorText& error : kErrors) {
        if (error.code == code) return error.name;
    }
    return "unrecognized error code";
}

const char* error_text(int code) noexcept {
    for (const ErrorText& error : kErrors) {
        if (error.code == code) return error.text;
    }
    return "unrecognized error code";
}

}  // namespace fastattn::cuda::runtime

void fastattn_emulator_synchronize() { fastattn::emulator::synchronize_all(); }
void fastattn_emulator_reset() { fastattn::emulator::reset(); }
void fastattn_emulator_fail_next(const char* function, int code) {
    fastattn::emulator::fail_next(function, code);
}
void fastattn_emulator_set_memory_limit(std::size_t bytes) { fastattn::emulator::set_memory_limit(bytes); }
void fastattn_emulator_set_device_count(int count) { fastattn::emulator::set_device_count(count); }
void fastattn_emulator_set_copies_eager(int eager) { fastattn::emulator::set_copies_eager(eager != 0); }
void fastattn_emulator_set_threads_reversed(int reversed) {
    fastattn::emulator::set_threads_reversed(reversed != 0);
}
std::size_t fastattn_emulator_live_allocations() { return fastattn::emulator::live_allocations(); }
std::size_t fastattn_emulator_pending() { return fastattn::emulator::pending(); }
void* fastattn_emulator_create_stream() {
    void* stream = nullptr;
    return fastattn::cuda::runtime::create_stream(&stream) == 0 ? stream : nullptr;
}
int fastattn_emulator_destroy_stream(void* stream) { return fastattn::cuda::runtime::destroy_stream(stream); }
