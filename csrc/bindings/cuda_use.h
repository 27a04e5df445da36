// What a call has to do with CUDA: its device, its stream, and whether to wait at the end.
#pragma once

#include <cstdint>
#include <optional>

#include <fastattn/tensor_view.h>

#include "bindings/py_util.h"

namespace fastattn::bindings {

// The arrays of a call that lie on a CUDA device. DLPack's rule: the consumer says the stream in which it will read, the
// producer sees to it that the data is ready there. Ours is the current stream of the first array's library, so that the call
// takes its place in the caller's order; where the library does not say one, a stream of our own, and the call waits.
class CudaUse {
public:
    // Before an array on cuda:`device` is asked for its memory; UnsupportedError, naming the array, when CUDA cannot be used.
    void join(PyObject* array, const char* name, std::int32_t device, bool managed);

    bool any() const noexcept { return joined_; }
    Device device() const noexcept { return device_; }
    void* stream() const noexcept { return stream_; }
    // Memory of some array may be used again by its library without regard to our stream.
    bool must_wait() const noexcept { return must_wait_; }
    // After the call was queued; without the GIL where that is possible.
    void wait() const;

private:
    bool joined_ = false, must_wait_ = false;
    Device device_{};
    void* stream_ = nullptr;
};

// Before the core is asked about CUDA: tells it where Python's packages have cuBLAS, and what `tune` measured. Costs nothing after
// the first time.
void prepare_cuda();
}  // namespace fastattn::bindings
