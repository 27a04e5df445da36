#include "bindings/dlpack_interop.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include <fastattn/attention.h>

#include "core/problem_errors.h"

namespace fastattn::bindings {
namespace {

// What data points to in views of no elements whose producer gave no address: null means "absent".
alignas(64) char empty_data[64];

// Errors of the producer that say "this array cannot be exported". Everything else is passed on as it is.
void wrap_producer_error(PyObject* object, const char* name, const char* method) {
    if (PyErr_ExceptionMatches(PyExc_BufferError) || PyErr_ExceptionMatches(PyExc_ValueError) ||
        PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_NotImplementedError) ||
        PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyRef error = take_error();
        const PyRef text = PyRef::checked(PyObject_Str(error.get()));
        set_error(std::move(error));
        raise_from(PyExc_TypeError, "%s: this %.200s cannot be read through DLPack; its %s says: %U", name,
                   type_name(object), method, text.get());
    }
    throw PythonError{};
}

// Where an array is, or UnsupportedError for a kind of memory that nothing here computes on.
Device to_device(std::int32_t type, std::int32_t id, const char* name) {
    switch (type) {
        case dlpack::kCpu:
        case dlpack::kCudaHost:
        case dlpack::kRocmHost: return {};
        case dlpack::kCuda:
        case dlpack::kCudaManaged: return {DeviceType::cuda, id};
        default: break;
    }
    const std::string where =
        type == dlpack::kRocm ? "rocm:" + std::to_string(id)
                              : "DLPack device (" + std::to_string(type) + ", " + std::to_string(id) + ")";
    throw UnsupportedError(
        std::string(name) + ": the array is on " + where +
        ", but fastattn computes on the CPU and on CUDA devices only; copy it to the host first");
}

// Where an array says that it is, and for memory of a device the stream that its __dlpack__ is to be told.
struct Announced {
    Device device;
    std::int64_t stream = 0;
};

// Asked before __dlpack__, which may wait for a device or refuse in words of its own.
Announced announced_device(PyObject* object, const char* name, CudaUse& cuda) {
    const PyRef device = PyRef::steal(PyObject_CallMethod(object, "__dlpack_device__", nullptr));
    if (!device) {
        wrap_producer_error(object, name, "__dlpack_device__()");
    }
    long type = 0, id = 0;
    const bool is_pair = PyTuple_Check(device.get()) && PyTuple_GET_SIZE(device.get()) == 2;
    if (is_pair) {
        type = PyLong_AsLong(PyTuple_GET_ITEM(device.get(), 0));
        id = PyErr_Occurred() == nullptr ? PyLong_AsLong(PyTuple_GET_ITEM(device.get(), 1)) : 0;
    }
    if (!is_pair || PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        raise(PyExc_TypeError, "%s: __dlpack_device__() of %.200s returned %R, expected a tuple of two ints",
              name, type_name(object), device.get());
    }
    const Device where = to_device(static_cast<std::int32_t>(type), static_cast<std::int32_t>(id), name);
    if (where.type == DeviceType::cuda) {
        return {where, cuda.join(object, name, where.index, type == dlpack::kCudaManaged)};
    }
    return {where};
}

// PyTorch's views of negated numbers (x.conj().imag) hold the numbers and a bit, which DLPack has no place
// for: such an input is a copy without the bit. Other libraries have no such views.
PyRef without_negative_bit(PyObject* object, const char* name, bool for_output) {
    const PyRef is_negated = optional_attribute(object, "is_neg");
    if (!is_negated || !PyCallable_Check(is_negated.get()) ||
        PyRef::checked(PyObject_CallNoArgs(is_negated.get())).get() != Py_True) {
        return PyRef::borrow(object);
    }
    if (for_output) {
        raise(PyExc_ValueError,
              "%s: expected an array that stores its own numbers, got a %.200s with PyTorch's negative bit "
              "(%s.is_neg()), a view of negated ones",
              name, type_name(object), name);
    }
    return PyRef::checked(PyObject_CallMethod(object, "resolve_neg", nullptr));
}

PyRef request_capsule(PyObject* object, const char* name, const Announced& where) {
    const PyRef version = PyRef::checked(
        Py_BuildValue("(II)", unsigned{dlpack::kMajorVersion}, unsigned{dlpack::kMinorVersion}));
    PyRef capsule;
    if (where.device.type == DeviceType::cuda) {
        const PyRef glue = PyRef::checked(PyImport_ImportModule("fastattn._arrays"));
        capsule = PyRef::steal(PyObject_CallMethod(glue.get(), "cuda_capsule", "OLO", object,
                                                   static_cast<long long>(where.stream), version.get()));
    } else {
        const PyRef method = PyRef::checked(PyUnicode_FromString("__dlpack__"));
        const PyRef keywords = PyRef::checked(Py_BuildValue("(s)", "max_version"));
        PyObject* arguments[] = {object, version.get()};
        capsule = PyRef::steal(PyObject_VectorcallMethod(method.get(), arguments, 1, keywords.get()));
        if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();  // a producer from before 1.0 does not know the keyword
            capsule = PyRef::steal(PyObject_VectorcallMethod(method.get(), arguments, 1, nullptr));
        }
    }
    if (!capsule) {
        wrap_producer_error(object, name, "__dlpack__()");
    }
    return capsule;
}

// Takes the tensor out of the capsule: from here on its deleter is our duty, on every path.
ManagedTensor take(PyObject* capsule, PyObject* object, const char* name) {
    if (PyCapsule_IsValid(capsule, dlpack::kVersionedName)) {
        void* pointer = PyCapsule_GetPointer(capsule, dlpack::kVersionedName);
        if (PyCapsule_SetName(capsule, dlpack::kVersionedUsedName) != 0) {
            throw PythonError{};
        }
        return ManagedTensor(static_cast<dlpack::DLManagedTensorVersioned*>(pointer));
    }
    if (PyCapsule_IsValid(capsule, dlpack::kLegacyName)) {
        void* pointer = PyCapsule_GetPointer(capsule, dlpack::kLegacyName);
        if (PyCapsule_SetName(capsule, dlpack::kLegacyUsedName) != 0) {
            throw PythonError{};
        }
        return ManagedTensor(static_cast<dlpack::DLManagedTensor*>(pointer));
    }
    raise(PyExc_TypeError,
          "%s: __dlpack__() of %.200s returned %R, expected a capsule named \"dltensor\" or "
          "\"dltensor_versioned\"",
          name, type_name(object), capsule);
}

bool dtype_of(const dlpack::DLDataType& type, DType& dtype) noexcept {
    struct Row {
        std::uint8_t code, bits;
        DType dtype;
    };
    static constexpr Row kRows[] = {
        {dlpack::kFloat, 32, DType::f32},   {dlpack::kFloat, 64, DType::f64},
        {dlpack::kFloat, 16, DType::f16},   {dlpack::kBfloat, 16, DType::bf16},
        {dlpack::kBool, 8, DType::boolean}, {dlpack::kInt, 8, DType::i8},
        {dlpack::kInt, 16, DType::i16},     {dlpack::kInt, 32, DType::i32},
        {dlpack::kInt, 64, DType::i64},     {dlpack::kUInt, 8, DType::u8},
        {dlpack::kUInt, 16, DType::u16},    {dlpack::kUInt, 32, DType::u32},
        {dlpack::kUInt, 64, DType::u64},
    };
    for (const Row& row : kRows) {
        if (row.code == type.code && row.bits == type.bits) {
            dtype = row.dtype;
            return true;
        }
    }
    return false;
}

void set_shape(const dlpack::DLTensor& tensor, const char* name, TensorView& view, bool& is_empty) {
    if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) {
        raise(PyExc_TypeError, "%s: the DLPack tensor has ndim %d and no usable shape", name,
              static_cast<int>(tensor.ndim));
    }
    view.rank = tensor.ndim;
    view.full_shape = tensor.ndim > kMaxRank ? tensor.shape : nullptr;  // lives as long as the tensor
    is_empty = false;
    for (int axis = 0; axis < tensor.ndim; ++axis) {
        const std::int64_t length = tensor.shape[axis];
        if (length < 0) {
            raise(PyExc_TypeError, "%s: axis %d of the DLPack tensor has length %lld", name, axis,
                  static_cast<long long>(length));
        }
        is_empty = is_empty || length == 0;
        if (axis < kMaxRank) {
            view.shape[axis] = length;
        }
    }
    const int rank = std::min(view.rank, kMaxRank);
    if (tensor.strides != nullptr) {
        std::copy_n(tensor.strides, rank, view.strides);
    } else if (view.rank <= kMaxRank) {
        checked_bytes(name, view.dtype, view.rank, view.shape);
        set_compact_strides(view);
    }
}

}  // namespace

ManagedTensor::~ManagedTensor() {
    if (legacy_ == nullptr && versioned_ == nullptr) {
        return;
    }
    in_destructor([this] {
        const ErrorSaver saver;  // the deleter may run Python code
        if (versioned_ != nullptr && versioned_->deleter != nullptr) {
            versioned_->deleter(versioned_);
        }
        if (legacy_ != nullptr && legacy_->deleter != nullptr) {
            legacy_->deleter(legacy_);
        }
    });
}

bool has_dlpack(PyObject* object) {
    return !PyType_Check(object) && static_cast<bool>(optional_attribute(object, "__dlpack__"));
}

void check_requires_grad(PyObject* object, const char* name) {
    const PyRef flag = optional_attribute(object, "requires_grad");
    if (flag && flag.get() == Py_True) {
        raise(PyExc_TypeError,
              "%s: this %.200s requires grad, and the gradient would be lost; use %s.detach()", name,
              type_name(object), name);
    }
}

ManagedTensor import_dlpack(PyObject* object, const char* name, bool for_output, TensorView& view,
                            bool& aligned, ByteStridedArray& bytes, CudaUse& cuda) {
    check_requires_grad(object, name);
    const Announced announced = announced_device(object, name, cuda);
    const PyRef plain = without_negative_bit(object, name, for_output);
    const PyRef capsule = request_capsule(plain.get(), name, announced);
    ManagedTensor managed = take(capsule.get(), object, name);
    if (managed.versioned() && managed.version().major != dlpack::kMajorVersion) {
        // Only version, manager_ctx and deleter are sure to be where we think they are.
        raise(PyExc_TypeError, "%s: %.200s exports DLPack version %u.%u, expected 1.x", name,
              type_name(object), managed.version().major, managed.version().minor);
    }
    const dlpack::DLTensor& tensor = managed.tensor();
    const Device where = to_device(tensor.device.device_type, tensor.device.device_id, name);
    if (!(where == announced.device)) {
        raise(PyExc_TypeError, "%s: %.200s announces memory of %s and exports memory of %s", name,
              type_name(object), device_string(announced.device).c_str(), device_string(where).c_str());
    }
    if (tensor.dtype.lanes != 1 || !dtype_of(tensor.dtype, view.dtype)) {
        raise(
            PyExc_TypeError,
            "%s: the DLPack dtype (code %d, %d bits, %d lanes) is not supported (float64, float32, float16, "
            "bfloat16, bool and integers are)",
            name, static_cast<int>(tensor.dtype.code), static_cast<int>(tensor.dtype.bits),
            static_cast<int>(tensor.dtype.lanes));
    }
    bool is_empty = false;
    set_shape(tensor, name, view, is_empty);
    view.device = where;
    view.readonly = (managed.flags() & dlpack::kReadOnly) != 0;
    if (for_output && (managed.flags() & dlpack::kIsCopied) != 0) {
        raise(PyExc_ValueError, "%s: %.200s exports a copy, so the result would be lost", name,
              type_name(object));
    }
    if (is_empty) {
        view.data = empty_data;
        aligned = true;
        return managed;
    }
    if (tensor.data == nullptr) {
        raise(PyExc_TypeError, "%s: the DLPack tensor has elements but no data", name);
    }
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    const std::size_t item = item_size(view.dtype);
    aligned = view.rank > kMaxRank || reinterpret_cast<std::uintptr_t>(view.data) % item == 0;
    if (!aligned && where.type == DeviceType::cuda) {
        raise(PyExc_ValueError,
              "%s: expected addresses that are multiples of the item size on a device, got %p", name,
              view.data);
    }
    if (!aligned) {
        bytes.data = static_cast<char*>(view.data);
        bytes.dtype = view.dtype;
        bytes.rank = view.rank;
        for (int axis = 0; axis < view.rank; ++axis) {
            bytes.shape[axis] = view.shape[axis];
            bytes.strides[axis] = view.strides[axis] * static_cast<std::int64_t>(item);
        }
    }
    return managed;
}

}  // namespace fastattn::bindings
