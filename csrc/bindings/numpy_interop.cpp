#include "bindings/numpy_interop.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

namespace fastattn::bindings {
namespace {

using py::detail::npy_api;

// What is used of NumPy's C API, a table whose places are its stable ABI. pybind11 has it too, but lets go of
// the GIL when it is first asked for it, in a way that a thread does not survive while the interpreter ends
// (leaving.h).
struct NumpyApi {
    unsigned (*feature_version)();
    PyTypeObject* array_type;
    PyObject* (*descr_from_type)(int);
    int (*descr_converter)(PyObject*, PyObject**);
    PyObject* (*new_from_descr)(PyTypeObject*, PyObject*, int, const Py_intptr_t*, const Py_intptr_t*, void*,
                                int, PyObject*);
};

const NumpyApi& numpy_api() {
    static std::atomic<const NumpyApi*> known{nullptr};  // the same for every interpreter
    const NumpyApi* api = known.load(std::memory_order_acquire);
    if (api != nullptr) {
        return *api;
    }
    PyRef module = PyRef::steal(PyImport_ImportModule("numpy._core.multiarray"));
    if (!module && PyErr_ExceptionMatches(PyExc_ModuleNotFoundError)) {
        PyErr_Clear();  // NumPy 1 in a frozen application, which has no use for the new name
        module = PyRef::checked(PyImport_ImportModule("numpy.core.multiarray"));
    }
    if (!module) {
        throw PythonError{};
    }
    const PyRef capsule = PyRef::checked(PyObject_GetAttrString(module.get(), "_ARRAY_API"));
    auto* const* table = static_cast<void* const*>(PyCapsule_GetPointer(capsule.get(), nullptr));
    if (table == nullptr) {
        throw PythonError{};
    }
    auto made = std::make_unique<NumpyApi>();
    made->feature_version = reinterpret_cast<decltype(made->feature_version)>(table[211]);
    made->array_type = static_cast<PyTypeObject*>(table[2]);
    made->descr_from_type = reinterpret_cast<decltype(made->descr_from_type)>(table[45]);
    made->descr_converter = reinterpret_cast<decltype(made->descr_converter)>(table[174]);
    made->new_from_descr = reinterpret_cast<decltype(made->new_from_descr)>(table[94]);
    if (known.compare_exchange_strong(api, made.get(), std::memory_order_acq_rel)) {
        return *made.release();
    }
    return *api;  // another thread was quicker
}

std::int64_t itemsize_of(PyObject* descr) {
    if (numpy_api().feature_version() < 0x12) {  // NumPy 1
        return py::detail::array_descriptor1_proxy(descr)->elsize;
    }
    return py::detail::array_descriptor2_proxy(descr)->elsize;
}

static_assert(sizeof(py::ssize_t) == sizeof(std::int64_t), "a 64-bit platform");

// Of enum NPY_TYPES; pybind11 does not list them.
constexpr int kHalf = 23, kFirstUserType = 256;

bool ends_with_bfloat16(const char* type) noexcept {
    const char* dot = std::strrchr(type, '.');
    return std::strcmp(dot == nullptr ? type : dot + 1, "bfloat16") == 0;
}

bool dtype_of_int_size(std::size_t size, bool is_signed, DType& dtype) noexcept {
    switch (size) {
        case 1: dtype = is_signed ? DType::i8 : DType::u8; return true;
        case 2: dtype = is_signed ? DType::i16 : DType::u16; return true;
        case 4: dtype = is_signed ? DType::i32 : DType::u32; return true;
        case 8: dtype = is_signed ? DType::i64 : DType::u64; return true;
        default: return false;
    }
}

// False when DType has no such dtype.
bool dtype_of(PyObject* descr, DType& dtype) {
    const auto* proxy = py::detail::array_descriptor_proxy(descr);
    switch (proxy->type_num) {
        case npy_api::NPY_FLOAT_: dtype = DType::f32; return true;
        case npy_api::NPY_DOUBLE_: dtype = DType::f64; return true;
        case kHalf: dtype = DType::f16; return true;
        case npy_api::NPY_BOOL_: dtype = DType::boolean; return true;
        case npy_api::NPY_BYTE_: dtype = DType::i8; return true;
        case npy_api::NPY_UBYTE_: dtype = DType::u8; return true;
        case npy_api::NPY_SHORT_: return dtype_of_int_size(sizeof(short), true, dtype);
        case npy_api::NPY_USHORT_: return dtype_of_int_size(sizeof(short), false, dtype);
        case npy_api::NPY_INT_: return dtype_of_int_size(sizeof(int), true, dtype);
        case npy_api::NPY_UINT_: return dtype_of_int_size(sizeof(int), false, dtype);
        case npy_api::NPY_LONG_: return dtype_of_int_size(sizeof(long), true, dtype);
        case npy_api::NPY_ULONG_: return dtype_of_int_size(sizeof(long), false, dtype);
        case npy_api::NPY_LONGLONG_: return dtype_of_int_size(sizeof(long long), true, dtype);
        case npy_api::NPY_ULONGLONG_: return dtype_of_int_size(sizeof(long long), false, dtype);
        default: break;
    }
    // ml_dtypes (and TensorFlow's older copy of it) registers its type with NumPy; the name of the scalar
    // type and the size are what identifies it without importing anything.
    if (proxy->type_num >= kFirstUserType &&
        ends_with_bfloat16(reinterpret_cast<PyTypeObject*>(proxy->typeobj)->tp_name) &&
        itemsize_of(descr) == 2) {
        dtype = DType::bf16;
        return true;
    }
    return false;
}

[[noreturn]] void refuse_dtype(PyObject* descr, const char* name) {
    const PyRef text = PyRef::checked(PyObject_Str(descr));
    raise(PyExc_TypeError,
          "%s: dtype %U is not supported (float64, float32, float16, bfloat16, bool and integers are)", name,
          text.get());
}

// Masked arrays would lose their mask silently. Other subclasses count as plain arrays.
void check_subclass(PyObject* array, const char* name) {
    const PyRef module = imported_module("numpy.ma");
    if (!module) {
        return;  // then nobody can have made one
    }
    const PyRef masked_array = PyRef::checked(PyObject_GetAttrString(module.get(), "MaskedArray"));
    const int is_masked = PyObject_IsInstance(array, masked_array.get());
    if (is_masked < 0) {
        throw PythonError{};
    }
    if (is_masked > 0) {
        raise(PyExc_TypeError,
              "%s: a %.200s has a mask of its own, which would be ignored; pass its .data and the mask as "
              "`mask`",
              name, type_name(array));
    }
}

}  // namespace

bool is_ndarray(PyObject* object) { return PyObject_TypeCheck(object, numpy_api().array_type) != 0; }

bool is_zero_dim_ndarray(PyObject* object) {
    return is_ndarray(object) && py::detail::array_proxy(object)->nd == 0;
}

bool is_numpy_bool(PyObject* object) {
    const char* type = type_name(object);  // numpy.bool in 2.x, numpy.bool_ before
    return std::strcmp(type, "numpy.bool") == 0 || std::strcmp(type, "numpy.bool_") == 0;
}

bool view_ndarray(PyObject* array, const char* name, TensorView& view, ByteStridedArray& bytes) {
    const auto* proxy = py::detail::array_proxy(array);
    if (Py_TYPE(array) != numpy_api().array_type) {
        check_subclass(array, name);
    }
    DType dtype{};
    if (!dtype_of(proxy->descr, dtype)) {
        refuse_dtype(proxy->descr, name);
    }
    constexpr char kForeign = PY_LITTLE_ENDIAN ? '>' : '<';
    if (py::detail::array_descriptor_proxy(proxy->descr)->byteorder == kForeign) {
        raise(PyExc_TypeError,
              "%s: expected native byte order, got dtype %R; use %s.astype(%s.dtype.newbyteorder('='))", name,
              proxy->descr, name, name);
    }
    view.dtype = dtype;
    view.device = {};
    view.readonly = (proxy->flags & npy_api::NPY_ARRAY_WRITEABLE_) == 0;
    view.rank = proxy->nd;
    view.data = proxy->data;
    if (view.rank > kMaxRank) {
        view.full_shape = reinterpret_cast<const std::int64_t*>(proxy->dimensions);
    }
    const auto item = static_cast<std::int64_t>(item_size(dtype));
    const int rank = std::min(view.rank, kMaxRank);
    bool aligned = reinterpret_cast<std::uintptr_t>(proxy->data) % item_size(dtype) == 0;
    for (int axis = 0; axis < rank; ++axis) {
        view.shape[axis] = proxy->dimensions[axis];
        const std::int64_t stride = proxy->strides[axis];
        if (stride % item == 0) {
            view.strides[axis] = stride / item;
        } else {
            view.strides[axis] = 0;
            aligned = aligned && view.shape[axis] <= 1;  // the stride of a single element is never used
        }
    }
    if (aligned || view.rank > kMaxRank) {  // validation refuses the latter
        return true;
    }
    bytes.data = proxy->data;
    bytes.dtype = dtype;
    bytes.rank = rank;
    std::copy_n(proxy->dimensions, rank, bytes.shape);
    std::copy_n(proxy->strides, rank, bytes.strides);
    return false;
}

// The dtype of q where it is bfloat16; else (a gradient of an argument that another library has) that of
// ml_dtypes.
static PyRef bfloat16_descr(PyObject* q) {
    PyObject* descr = py::detail::array_proxy(q)->descr;
    if (ends_with_bfloat16(
            reinterpret_cast<PyTypeObject*>(py::detail::array_descriptor_proxy(descr)->typeobj)->tp_name)) {
        return PyRef::borrow(descr);
    }
    const PyRef module = PyRef::checked(PyImport_ImportModule("ml_dtypes"));
    const PyRef type = PyRef::checked(PyObject_GetAttrString(module.get(), "bfloat16"));
    PyObject* dtype = nullptr;
    if (numpy_api().descr_converter(type.get(), &dtype) == 0) {
        throw PythonError{};
    }
    return PyRef::steal(dtype);
}

PyRef new_ndarray(const char* name, PyObject* q, DType dtype, int rank, const std::int64_t* shape,
                  TensorView& view) {
    const std::int64_t size = checked_bytes(name, dtype, rank, shape);
    const NumpyApi& api = numpy_api();
    py::ssize_t dimensions[kMaxRank] = {};
    std::copy_n(shape, rank, dimensions);
    PyObject* descr = nullptr;  // NewFromDescr takes the reference
    switch (dtype) {
        case DType::f64: descr = api.descr_from_type(npy_api::NPY_DOUBLE_); break;
        case DType::f16: descr = api.descr_from_type(kHalf); break;
        case DType::bf16: descr = bfloat16_descr(q).release(); break;
        default: descr = api.descr_from_type(npy_api::NPY_FLOAT_); break;
    }
    PyRef array = PyRef::steal(
        api.new_from_descr(api.array_type, descr, rank, dimensions, nullptr, nullptr, 0, nullptr));
    if (!array) {
        if (PyErr_ExceptionMatches(PyExc_MemoryError)) {
            PyErr_Clear();
            raise(PyExc_MemoryError, "%s: could not allocate %zd bytes", name,
                  static_cast<py::ssize_t>(size));
        }
        throw PythonError{};
    }
    const auto* proxy = py::detail::array_proxy(array.get());
    view = TensorView{};
    view.data = proxy->data;
    view.dtype = dtype;
    view.rank = rank;
    std::copy_n(shape, rank, view.shape);
    set_compact_strides(view);
    return array;
}

}  // namespace fastattn::bindings
