#include "bindings/cuda_use.h"

#include <atomic>
#include <optional>
#include <string>

#include <fastattn/attention.h>

#include "bindings/gil.h"
#include "core/cuda_room.h"
#include "core/kernel.h"

namespace fastattn::bindings {
namespace {

// The current stream of the array's library as an integer; none: it does not say.
std::optional<std::uintptr_t> current_stream(PyObject* array) {
    const PyRef glue = PyRef::checked(PyImport_ImportModule("fastattn._arrays"));
    const PyRef stream = PyRef::checked(PyObject_CallMethod(glue.get(), "cuda_stream", "O", array));
    if (stream.get() == Py_None) {
        return std::nullopt;
    }
    const unsigned long long value = PyLong_AsUnsignedLongLong(stream.get());
    if (PyErr_Occurred() != nullptr) {
        throw PythonError{};
    }
    return static_cast<std::uintptr_t>(value);
}

}  // namespace

std::int64_t CudaUse::join(PyObject* array, const char* name, std::int32_t device, bool managed) {
    prepare_cuda();
    const Device here{DeviceType::cuda, device};
    const char* reason = cuda_unavailable();
    if (reason != nullptr || device < 0 || device >= cuda_device_count()) {
        const std::string where =
            (managed ? "CUDA managed memory of cuda:" : "cuda:") + std::to_string(device);
        throw UnsupportedError(
            std::string(name) + ": the array is on " + where + ", but CUDA cannot be used: " +
            (reason != nullptr ? reason : "there is no such device") + "; copy it to the host first");
    }
    const std::optional<std::uintptr_t> theirs = current_stream(array);
    if (!joined_) {
        joined_ = true;
        device_ = here;
        stream_ = theirs ? reinterpret_cast<void*>(*theirs) : cuda_own_stream(device);
    }
    const auto ours = reinterpret_cast<std::uintptr_t>(stream_);
    if (theirs && *theirs == ours) {
        return -1;
    }
    must_wait_ = true;
    return ours == 0 ? 1 : static_cast<std::int64_t>(ours);  // the protocol's number of the default stream
}

void CudaUse::wait() noexcept {
    if (!must_wait_) {
        return;
    }
    try {
        without_gil([this] { cuda_wait(device_.index, stream_); });
    } catch (...) {
        failure_ = std::current_exception();
    }
}

void prepare_cuda() {
    static std::atomic<bool> done{false};
    if (done.load(std::memory_order_acquire) || !cuda_needs_library()) {
        return;
    }
    const PyRef glue = PyRef::checked(PyImport_ImportModule("fastattn._cuda"));
    const PyRef path = PyRef::checked(PyObject_CallMethod(glue.get(), "find_cublas", nullptr));
    if (path.get() != Py_None) {
        PyObject* bytes = nullptr;
        if (PyUnicode_FSConverter(path.get(), &bytes) == 0) {
            throw PythonError{};
        }
        const PyRef owner = PyRef::steal(bytes);
        cuda_offer_library(PyBytes_AS_STRING(bytes));
    }
    done.store(true, std::memory_order_release);
}

void load_device_speeds() {
    static std::atomic<bool> done{false};
    if (done.exchange(true, std::memory_order_acq_rel)) {
        return;
    }
    const PyRef glue = PyRef::checked(PyImport_ImportModule("fastattn._cuda"));
    const PyRef speeds = PyRef::checked(PyObject_CallMethod(glue.get(), "stored_speeds", nullptr));
    if (speeds.get() == Py_None) {
        return;
    }
    const PyRef core = PyRef::checked(PyImport_ImportModule("fastattn._core"));
    const PyRef set = PyRef::checked(PyObject_GetAttrString(core.get(), "set_device_speeds"));
    const PyRef none = PyRef::checked(PyTuple_New(0));
    PyRef::checked(PyObject_Call(set.get(), none.get(), speeds.get()));
}

}  // namespace fastattn::bindings
