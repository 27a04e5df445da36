// What a call has to do with CUDA: its device, its stream, and whether to wait at the end.
#pragma once

#include <cstdint>
#include <exception>

#include <fastattn/tensor_view.h>

#include "bindings/py_util.h"

namespace fastattn::bindings {

// The arrays of a call that lie on a CUDA device. DLPack's rule: the consumer says the stream in which it
// will read, the producer sees to it that the data is ready there. Ours is the current stream of the first
// array's library, so that the call takes its place in the caller's order; where the library does not say
// one, a stream of our own, and the call waits.
class CudaUse {
public:
    // Before an array on cuda:`device` is asked for its memory; UnsupportedError, naming the array, when CUDA
    // cannot be used. Returns the stream that the array's __dlpack__ is to be told: -1 where its library
    // queues in ours anyway.
    std::int64_t join(PyObject* array, const char* name, std::int32_t device, bool managed);

    void* stream() const noexcept { return stream_; }

    // Waits at its end, where memory of some array may be used again by its library without regard to our
    // stream.
    class Wait {
    public:
        explicit Wait(CudaUse& use) noexcept : use_(use) {}
        ~Wait() { use_.wait(); }
        Wait(const Wait&) = delete;
        Wait& operator=(const Wait&) = delete;

    private:
        CudaUse& use_;
    };
    // Throws what the waiting found.
    void check() const {
        if (failure_) {
            std::rethrow_exception(failure_);
        }
    }

private:
    void wait() noexcept;

    bool joined_ = false, must_wait_ = false;
    std::exception_ptr failure_;
    Device device_{};
    void* stream_ = nullptr;
};

// Before the core is asked about CUDA: tells it where Python's packages have cuBLAS. Starts the driver. Costs
// nothing after the first time.
void prepare_cuda();
// What `tune` measured, for the core. Reads a file once; without one the driver is not started.
void load_device_speeds();
}  // namespace fastattn::bindings
