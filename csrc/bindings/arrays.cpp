#include "bindings/arrays.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include <fastattn/attention.h>

#include "bindings/numpy_interop.h"

namespace fastattn::bindings {
namespace {

Extent extent_of(const TensorView& view) noexcept {
    ByteStridedArray bytes;
    bytes.data = static_cast<char*>(view.data);
    bytes.dtype = view.dtype;
    bytes.rank = std::min(view.rank, kMaxRank);
    for (int axis = 0; axis < bytes.rank; ++axis) {
        bytes.shape[axis] = view.shape[axis];
        bytes.strides[axis] = view.strides[axis] * static_cast<std::int64_t>(item_size(view.dtype));
    }
    return bytes.extent();
}

// Sorted by stride, each axis must step over everything inside it. Sufficient, and true of every array that
// slicing and transposing can make.
bool elements_are_apart(const ByteStridedArray& array) {
    struct Axis {
        std::int64_t stride, length;
    };
    Axis axes[kMaxRank] = {};
    int count = 0;
    for (int axis = 0; axis < array.rank; ++axis) {
        if (array.shape[axis] == 0) {
            return true;
        }
        if (array.shape[axis] > 1) {
            const Axis next{std::abs(array.strides[axis]), array.shape[axis]};
            int at = count++;
            for (; at > 0 && axes[at - 1].stride > next.stride; --at) {
                axes[at] = axes[at - 1];
            }
            axes[at] = next;
        }
    }
    auto inner = static_cast<std::int64_t>(item_size(array.dtype));
    for (int axis = 0; axis < count; ++axis) {
        if (axes[axis].stride < inner) {
            return false;
        }
        inner += axes[axis].stride * (axes[axis].length - 1);
    }
    return true;
}

PyRef glue() { return PyRef::checked(PyImport_ImportModule("fastattn._arrays")); }

PyRef shape_tuple(int rank, const std::int64_t* shape) {
    PyRef tuple = PyRef::checked(PyTuple_New(rank));
    for (int axis = 0; axis < rank; ++axis) {
        PyTuple_SET_ITEM(tuple.get(), axis, PyRef::checked(PyLong_FromLongLong(shape[axis])).release());
    }
    return tuple;
}

[[noreturn]] void fail_overlap(const char* name) {
    throw ValueError(std::string("out: expected memory of its own, but it may share memory with ") + name);
}

}  // namespace

// As view_ndarray(), for every kind of array.
bool Arrays::view_of(PyObject* object, const char* name, bool for_output, TensorView& view,
                     ByteStridedArray& bytes) {
    if (is_ndarray(object)) {
        return view_ndarray(object, name, view, bytes);
    }
    if (!has_dlpack(object)) {
        raise(PyExc_TypeError, "%s: expected an array (NumPy's or any with __dlpack__), got %.200s", name,
              type_name(object));
    }
    bool aligned = false;
    lent_.push_back(import_dlpack(object, name, for_output, view, aligned, bytes, cuda_));
    return aligned;
}

TensorView Arrays::input(PyObject* object, const char* name) {
    TensorView view;
    ByteStridedArray bytes;
    if (!view_of(object, name, false, view, bytes)) {
        copies_.push_back(aligned_copy(name, bytes, true, view));
        copied_inputs_.push_back({name, bytes.extent()});
    }
    return view;
}

TensorView Arrays::output(PyObject* object, const char* name) {
    TensorView view;
    if (!is_ndarray(object)) {  // immutable kinds lend their memory all the same
        PyRef::checked(PyObject_CallMethod(glue().get(), "check_writable", "O", object));
    }
    if (!view_of(object, name, true, view, out_bytes_)) {
        const bool readonly = view.readonly;
        if (!elements_are_apart(out_bytes_)) {
            throw ValueError(std::string(name) + ": expected elements that do not overlap each other");
        }
        out_copy_ = aligned_copy(name, out_bytes_, false, view);
        view.readonly = readonly;
    }
    return view;
}

void Arrays::check_overlap_of_copies(const TensorView& out) const {
    if (copied_inputs_.empty()) {
        return;
    }
    const Extent written = out_copy_ ? out_bytes_.extent() : extent_of(out);
    for (const CopiedInput& copied : copied_inputs_) {
        if (written.meets(copied.extent)) {
            fail_overlap(copied.name);
        }
    }
}

void Arrays::check_overlap_with_copy(const char* name, const TensorView& input) const {
    if (out_copy_ && input.given() && out_bytes_.extent().meets(extent_of(input))) {
        fail_overlap(name);
    }
}

void Arrays::write_back() const {
    if (out_copy_) {
        copy_back(*out_copy_, out_bytes_);
    }
}

void Result::allocate(PyObject* q, Device device, const char* name, DType dtype, int rank,
                      const std::int64_t* shape, TensorView& view, CudaUse& cuda) {
    if (is_ndarray(q)) {
        object_ = new_ndarray(name, q, dtype, rank, shape, view);
        return;
    }
    const std::int64_t size = checked_bytes(name, dtype, rank, shape);
    const PyRef dimensions = shape_tuple(rank, shape);
    PyRef object = PyRef::steal(
        PyObject_CallMethod(glue().get(), "empty", "OOs", q, dimensions.get(), dtype_name(dtype)));
    if (!object) {
        if (PyErr_ExceptionMatches(PyExc_MemoryError)) {
            raise_from(PyExc_MemoryError, "%s: could not allocate %lld bytes", name,
                       static_cast<long long>(size));
        }
        throw PythonError{};
    }
    if (object.get() == Py_None) {
        buffer_.emplace(name, dtype, rank, shape, device);
        view = buffer_->view();
        return;
    }
    bool aligned = false;
    ByteStridedArray bytes;
    lent_.emplace(import_dlpack(object.get(), name, true, view, aligned, bytes, cuda));
    if (!aligned || view.dtype != dtype || view.rank != rank ||
        !std::equal(shape, shape + rank, view.shape)) {
        raise(PyExc_RuntimeError, "%s: fastattn._arrays.empty returned another array than asked for", name);
    }
    object_ = std::move(object);
}

PyRef Result::take(PyObject* q) {
    lent_.reset();
    if (!buffer_) {
        return std::move(object_);
    }
    const PyRef buffer = PyRef::steal(py::cast(std::move(*buffer_)).release().ptr());
    buffer_.reset();
    return PyRef::checked(PyObject_CallMethod(glue().get(), "adopt", "OO", q, buffer.get()));
}

void mark_written(PyObject* out) {
    if (!is_ndarray(out)) {
        PyRef::checked(PyObject_CallMethod(glue().get(), "mark_written", "O", out));
    }
}

}  // namespace fastattn::bindings
