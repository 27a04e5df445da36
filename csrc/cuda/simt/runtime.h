// The functions of the CUDA run time that host code uses, as symbols of our own: runtime_cudart.cpp fills
// them with cudart, tests/cuda_emulator with a GPU that is this machine's memory. So all host code of this
// room compiles, links and is tested without CUDA.
//
// Every function returns 0 or the error code of CUDA, which throw_on_error() of errors.h understands.
#pragma once

#include <cstddef>

namespace fastattn::cuda {

struct TensorMap;  // tile_map.h
struct TileMapLayout;

using Stream = void*;  // cudaStream_t: 0 and 1 the legacy default stream, 2 the thread's own
using Event = void*;  // cudaEvent_t
using Pool = void*;  // cudaMemPool_t

enum class Copy { to_device, to_host };

struct DeviceProperties {
    char name[256] = {};
    int major = 0, minor = 0;  // compute capability
    int multiprocessors = 1;
    std::size_t l2_bytes = 0;
};

namespace runtime {

// ---- what is there --------------------------------------------------------------------------------
int driver_version(int* version) noexcept;  // 0: no driver; 13000 for CUDA 13.0
int runtime_version(int* version) noexcept;
int device_count(int* count) noexcept;
int properties(int device, DeviceProperties* properties) noexcept;
int current_device(int* device) noexcept;
int set_device(int device) noexcept;

// ---- memory; allocations are ordered by their stream ------------------------------------------------
// A pool of `device` that keeps up to `kept_bytes` of freed memory for later calls.
int create_pool(int device, std::size_t kept_bytes, Pool* pool) noexcept;
int allocate(void** data, std::size_t bytes, Pool pool, Stream stream) noexcept;
int release(void* data, Stream stream) noexcept;
// Not ordered by a stream: release_plain() waits until nothing on the device uses the memory any more.
int allocate_plain(void** data, std::size_t bytes) noexcept;
int release_plain(void* data) noexcept;
int allocate_pinned(void** data, std::size_t bytes) noexcept;
int release_pinned(void* data) noexcept;
int copy(void* target, const void* source, std::size_t bytes, Copy kind, Stream stream) noexcept;
// std::free(data) when `stream` gets there: for the source of a copy. On failure `data` is still the
// caller's.
int free_host_after(void* data, Stream stream) noexcept;

// An array for the copy engine of compute capability 9.0 and newer.
int encode_tile_map(const TileMapLayout& layout, TensorMap* map) noexcept;

// ---- order ------------------------------------------------------------------------------------------
int create_stream(Stream* stream) noexcept;  // does not wait for the default stream
int destroy_stream(Stream stream) noexcept;
int synchronize(Stream stream) noexcept;
int is_capturing(Stream stream, bool* capturing) noexcept;  // into a graph
int create_event(Event* event) noexcept;  // without timing
int destroy_event(Event event) noexcept;
int record(Event event, Stream stream) noexcept;
int wait(Stream stream, Event event) noexcept;  // what follows in `stream` waits for `event`
int query(Event event) noexcept;  // 0: over; kNotReady

// ---- errors -----------------------------------------------------------------------------------------
int last_error() noexcept;  // of this thread's launches, and forgets it
const char* error_name(int code) noexcept;
const char* error_text(int code) noexcept;

}  // namespace runtime

// Error codes that the rest of this room tells apart (driver_types.h; checked by a test).
inline constexpr int kNoMemory = 2;
inline constexpr int kInsufficientDriver = 35;
inline constexpr int kNoDevice = 100;
inline constexpr int kNotReady = 600;
inline constexpr int kNotSupported = 801;

}  // namespace fastattn::cuda
