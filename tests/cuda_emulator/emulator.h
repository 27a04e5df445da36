// Control of the emulated GPU: what tests set, break and count. The GPU itself is runtime.cpp (memory and
// streams), simt.cpp (kernels) and cublas.cpp (products); its memory is this machine's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/blas/abi.h"
#include "cuda/simt/runtime.h"

namespace fastattn::emulator {

// ---- what the machine is; reset() restores the values named here ------------------------------------------
void set_device_count(int count);  // 2
void set_driver_version(int version);  // 13000; 0: no driver
void set_compute_capability(int device, int major, int minor);  // 9.0
void set_l2_bytes(std::size_t bytes);  // 1 MiB
void set_memory_limit(std::size_t bytes);  // 2 GiB for each device; allocate() gives kNoMemory above it
void set_capturing(bool capturing);  // false; whether streams are being captured into a graph
void set_cublas_available(bool available);  // true
void set_cublas_version(std::size_t version);  // 130002
void set_pointer_arrays_supported(bool supported);  // true; else the heuristic answers kNotSupported
// false; else the threads of a block start from the last one: a missing barrier shows in one order or the
// other.
void set_threads_reversed(bool reversed);
// false; else copies of the copy engine happen when they are asked for, the earliest that the rules allow: a
// stage that is given back too early shows.
void set_copies_eager(bool eager);
bool copies_eager();

// Call number `after` + 1 from now of `function` does nothing but return `code`. Names: the functions of
// runtime.h, those of cublas::Table, "open" (any code: no library), "launch" (last_error() has the code),
// "*" (whichever of these but last_error, error_name, error_text comes).
void fail_next(const char* function, int code, std::size_t after = 0);

// Executes all that is queued, forgets failures that were asked for, counts and the log. Objects stay alive.
void reset();

// ---- execution --------------------------------------------------------------------------------------------
void synchronize_all();  // every stream of every device and thread

// ---- counts -----------------------------------------------------------------------------------------------
std::size_t live_allocations();  // until a stream gets to the release
std::size_t live_pinned();
std::size_t live_streams();
std::size_t live_events();
std::size_t live_descriptors();  // cuBLASLt descriptors, layouts and preferences
std::size_t pending();  // operations that are queued and not executed
std::size_t calls(const char* function);  // named as for fail_next
std::size_t heuristic_calls();

// ---- the log of products ----------------------------------------------------------------------------------
struct MatmulRecord {
    cuda::cublas::ComputeType compute;
    bool transpose_a, transpose_b;
    cuda::cublas::DataType a, b, c;
    std::int64_t m, n, k;
    std::int64_t lda, ldb, ldc;
    int batches;
    std::int64_t stride_a, stride_b, stride_c;  // elements
    bool pointer_array;
    float alpha, beta;
    std::size_t workspace_bytes;
    cuda::Stream stream;
};
std::vector<MatmulRecord> take_matmuls();  // since the last call, in the order of the calls to Matmul

}  // namespace fastattn::emulator

// The same for Python's ctypes.
#define FASTATTN_EMULATOR_EXPORT __attribute__((visibility("default"), used))
extern "C" {
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_synchronize();
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_reset();
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_fail_next(const char* function, int code);
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_set_memory_limit(std::size_t bytes);
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_set_device_count(int count);
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_set_copies_eager(int eager);
FASTATTN_EMULATOR_EXPORT void fastattn_emulator_set_threads_reversed(int reversed);
FASTATTN_EMULATOR_EXPORT std::size_t fastattn_emulator_live_allocations();
FASTATTN_EMULATOR_EXPORT std::size_t fastattn_emulator_pending();
FASTATTN_EMULATOR_EXPORT void* fastattn_emulator_create_stream();  // null on failure
FASTATTN_EMULATOR_EXPORT int fastattn_emulator_destroy_stream(void* stream);
}
