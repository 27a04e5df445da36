#include "bindings/buffer.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include <fastattn/attention.h>

#include "bindings/dlpack_abi.h"
#include "core/cuda_room.h"
#include "core/memory_overlap.h"
#include "core/problem_errors.h"

namespace fastattn::bindings {
namespace {

constexpr std::size_t kAlignment = 64;  // a cache line; what XLA asks for to adopt memory without a copy

std::int64_t element_count(const TensorView& view) noexcept {
    std::int64_t count = 1;
    for (int axis = 0; axis < view.rank; ++axis) {
        count *= view.shape[axis];
    }
    return count;
}

// Copies between two arrays of the same shape, element by element: the cold path of odd addresses.
template <std::size_t Size>
void copy_strided(const char* source, const std::int64_t* source_strides, char* target,
                  const std::int64_t* target_strides, const std::int64_t* shape, int rank) {
    if (rank == 0) {
        std::memcpy(target, source, Size);
        return;
    }
    for (std::int64_t i = 0; i < shape[0]; ++i) {
        if (rank == 1) {
            std::memcpy(target, source, Size);
        } else {
            copy_strided<Size>(source, source_strides + 1, target, target_strides + 1, shape + 1, rank - 1);
        }
        source += source_strides[0];
        target += target_strides[0];
    }
}

void copy_strided(DType dtype, const char* source, const std::int64_t* source_strides, char* target,
                  const std::int64_t* target_strides, const std::int64_t* shape, int rank) {
    for (int axis = 0; axis < rank; ++axis) {
        if (shape[axis] == 0) {
            return;
        }
    }
    switch (item_size(dtype)) {
        case 1: return copy_strided<1>(source, source_strides, target, target_strides, shape, rank);
        case 2: return copy_strided<2>(source, source_strides, target, target_strides, shape, rank);
        case 4: return copy_strided<4>(source, source_strides, target, target_strides, shape, rank);
        default: return copy_strided<8>(source, source_strides, target, target_strides, shape, rank);
    }
}

void byte_strides(const TensorView& view, std::int64_t* strides) noexcept {
    for (int axis = 0; axis < view.rank; ++axis) {
        strides[axis] = view.strides[axis] * static_cast<std::int64_t>(item_size(view.dtype));
    }
}

// ---- export through DLPack ------------------------------------------------------------------------
// The deleter runs on any thread, with or without the GIL: it must not touch Python.
template <class Managed>
struct Exported {
    Managed managed{};
    std::shared_ptr<std::byte> memory;
    std::int64_t shape[kMaxRank] = {}, strides[kMaxRank] = {};
};

dlpack::DLDataType dlpack_dtype(DType dtype) noexcept {
    std::uint8_t code = dlpack::kUInt;
    if (dtype == DType::bf16) {
        code = dlpack::kBfloat;
    } else if (is_float(dtype)) {
        code = dlpack::kFloat;
    } else if (dtype == DType::boolean) {
        code = dlpack::kBool;
    } else if (dtype <= DType::i64) {
        code = dlpack::kInt;
    }
    return {code, static_cast<std::uint8_t>(8 * item_size(dtype)), 1};
}

dlpack::DLDevice dlpack_device(Device device) noexcept {
    return {device.type == DeviceType::cuda ? dlpack::kCuda : dlpack::kCpu, device.index};
}

template <class Managed>
void delete_exported(Managed* managed) {
    delete static_cast<Exported<Managed>*>(managed->manager_ctx);
}

template <class Managed>
void release_unused_capsule(PyObject* capsule, const char* name) {
    if (PyCapsule_IsValid(capsule, name)) {  // consumers rename what they take
        auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
        managed->deleter(managed);
    }
}

template <class Managed>
py::object make_capsule(const Buffer& buffer, const char* name, PyCapsule_Destructor destructor) {
    const TensorView& view = buffer.view();
    auto exported = std::make_unique<Exported<Managed>>();
    exported->memory = buffer.memory();
    std::copy_n(view.shape, view.rank, exported->shape);
    std::copy_n(view.strides, view.rank, exported->strides);
    Managed& managed = exported->managed;
    managed.dl_tensor = {view.data,       dlpack_device(view.device), view.rank, dlpack_dtype(view.dtype),
                         exported->shape, exported->strides,          0};
    managed.manager_ctx = exported.get();
    managed.deleter = &delete_exported<Managed>;
    PyObject* capsule = PyCapsule_New(&managed, name, destructor);
    if (capsule == nullptr) {
        throw py::error_already_set();
    }
    exported.release();
    return py::reinterpret_steal<py::object>(capsule);
}

py::object export_dlpack(const Buffer& self, const py::object& stream, const py::object& max_version,
                         const py::object& dl_device, const py::object& copy) {
    const bool on_device = self.view().device.type == DeviceType::cuda;
    // A device buffer was waited for when it was made, so that every stream may read it.
    if (!on_device && !stream.is_none() && !(py::isinstance<py::int_>(stream) && stream.cast<long>() == -1)) {
        throw py::buffer_error("Buffer.__dlpack__: memory of the CPU has no stream");
    }
    const dlpack::DLDevice here = dlpack_device(self.view().device);
    if (!dl_device.is_none() &&
        dl_device.cast<std::pair<int, int>>() != std::pair<int, int>{here.device_type, here.device_id}) {
        throw py::buffer_error("Buffer.__dlpack__: the memory is on " + device_string(self.view().device) +
                               " and is not copied elsewhere");
    }
    std::optional<Buffer> copied;
    if (!copy.is_none() && copy.cast<bool>()) {
        if (on_device) {
            throw py::buffer_error("Buffer.__dlpack__: memory of a device is not copied");
        }
        const TensorView& view = self.view();
        copied.emplace("copy", view.dtype, view.rank, view.shape);
        std::memcpy(copied->view().data, view.data,
                    static_cast<std::size_t>(element_count(view)) * item_size(view.dtype));
    }
    const Buffer& buffer = copied ? *copied : self;
    const bool versioned = !max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1;
    if (!versioned) {
        return make_capsule<dlpack::DLManagedTensor>(buffer, dlpack::kLegacyName, [](PyObject* capsule) {
            release_unused_capsule<dlpack::DLManagedTensor>(capsule, dlpack::kLegacyName);
        });
    }
    py::object capsule = make_capsule<dlpack::DLManagedTensorVersioned>(
        buffer, dlpack::kVersionedName, [](PyObject* self_capsule) {
            release_unused_capsule<dlpack::DLManagedTensorVersioned>(self_capsule, dlpack::kVersionedName);
        });
    auto* managed = static_cast<dlpack::DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kVersionedName));
    managed->version = {dlpack::kMajorVersion, dlpack::kMinorVersion};
    managed->flags = copied ? dlpack::kIsCopied : 0;
    return capsule;
}

py::dict array_interface(const Buffer& self) {
    const TensorView& view = self.view();
    if (view.device.type == DeviceType::cuda) {
        throw py::attribute_error("__array_interface__: the memory is on " + device_string(view.device));
    }
    const char kind = view.dtype == DType::bf16      ? 'u'  // NumPy itself has no name for it
                      : is_float(view.dtype)         ? 'f'
                      : view.dtype == DType::boolean ? 'b'
                      : view.dtype <= DType::i64     ? 'i'
                                                     : 'u';
    py::tuple shape(view.rank);
    for (int axis = 0; axis < view.rank; ++axis) {
        shape[static_cast<std::size_t>(axis)] = py::int_(view.shape[axis]);
    }
    py::dict result;
    result["version"] = 3;
    result["shape"] = shape;
    result["typestr"] = (item_size(view.dtype) == 1 ? "|"
                         : PY_LITTLE_ENDIAN         ? "<"
                                                    : ">") +
                        std::string(1, kind) + std::to_string(item_size(view.dtype));
    result["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(view.data), false);
    return result;
}

}  // namespace

std::int64_t checked_bytes(const char* name, DType dtype, int rank, const std::int64_t* shape) {
    for (int axis = 0; axis < rank; ++axis) {
        if (shape[axis] == 0) {
            return 0;
        }
    }
    auto bytes = static_cast<std::int64_t>(item_size(dtype));
    for (int axis = 0; axis < rank; ++axis) {
        if (multiply_overflows(bytes, shape[axis], &bytes)) {
            throw ValueError(std::string(name) + ": an array of shape " + shape_string(shape, rank) +
                             " and dtype " + dtype_name(dtype) + " has more than 2**63 - 1 bytes");
        }
    }
    return bytes;
}

void set_compact_strides(TensorView& view) noexcept {
    // Unsigned, since the shape of an array that is never allocated may overflow.
    std::uint64_t stride = 1;
    for (int axis = view.rank - 1; axis >= 0; --axis) {
        view.strides[axis] = static_cast<std::int64_t>(stride);
        stride *= static_cast<std::uint64_t>(view.shape[axis]);
    }
}

Buffer::Buffer(const char* what_for, DType dtype, int rank, const std::int64_t* shape, Device device) {
    const auto bytes = static_cast<std::size_t>(checked_bytes(what_for, dtype, rank, shape));
    if (device.type == DeviceType::cuda) {
        memory_ = cuda_allocate(device.index, bytes, what_for);
    } else {
        // Never zero bytes, so that the pointer is never null.
        void* memory = ::operator new(bytes > 0 ? bytes : 1, std::align_val_t{kAlignment}, std::nothrow);
        if (memory == nullptr) {
            throw OutOfMemory(what_for, bytes);
        }
        memory_ = std::shared_ptr<std::byte>(static_cast<std::byte*>(memory), [](std::byte* p) {
            ::operator delete(p, std::align_val_t{kAlignment});
        });
    }
    view_.data = memory_.get();
    view_.device = device;
    view_.dtype = dtype;
    view_.rank = rank;
    std::copy_n(shape, rank, view_.shape);
    set_compact_strides(view_);
}

Extent ByteStridedArray::extent() const noexcept {
    auto begin = reinterpret_cast<std::uintptr_t>(data);
    auto end = begin + item_size(dtype);
    for (int axis = 0; axis < rank; ++axis) {
        if (shape[axis] == 0) {
            return {};
        }
        const std::int64_t reach = (shape[axis] - 1) * strides[axis];
        (reach < 0 ? begin : end) += static_cast<std::uintptr_t>(reach);
    }
    return {begin, end};
}

Buffer aligned_copy(const char* name, const ByteStridedArray& source, bool copy_elements, TensorView& view) {
    std::int64_t stored[kMaxRank] = {};
    for (int axis = 0; axis < source.rank; ++axis) {
        const bool broadcast = source.strides[axis] == 0 && source.shape[axis] > 1;
        stored[axis] = broadcast ? 1 : source.shape[axis];
    }
    Buffer copy(name, source.dtype, source.rank, stored);
    if (copy_elements) {
        std::int64_t strides[kMaxRank] = {};
        byte_strides(copy.view(), strides);
        copy_strided(source.dtype, source.data, source.strides, static_cast<char*>(copy.view().data), strides,
                     stored, source.rank);
    }
    view = copy.view();
    for (int axis = 0; axis < source.rank; ++axis) {
        if (stored[axis] != source.shape[axis]) {
            view.shape[axis] = source.shape[axis];
            view.strides[axis] = 0;
        }
    }
    return copy;
}

void copy_back(const Buffer& copy, const ByteStridedArray& target) {
    std::int64_t strides[kMaxRank] = {};
    byte_strides(copy.view(), strides);
    copy_strided(target.dtype, static_cast<const char*>(copy.view().data), strides, target.data,
                 target.strides, target.shape, target.rank);
}

void register_buffer(py::module_& m) {
    py::class_<Buffer>(m, "Buffer",
                       "A result in memory of this module, on its way to another library's array.\n\n"
                       "Not made by users: fastattn hands it to the ``from_dlpack`` of q's library.")
        .def("__dlpack__", &export_dlpack, py::kw_only(), py::arg("stream") = py::none(),
             py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
             py::arg("copy") = py::none())
        .def("__dlpack_device__",
             [](const Buffer& self) {
                 const dlpack::DLDevice device = dlpack_device(self.view().device);
                 return py::make_tuple(int{device.device_type}, int{device.device_id});
             })
        .def_property_readonly("__array_interface__", &array_interface)
        .def_property_readonly("dtype", [](const Buffer& self) { return dtype_name(self.view().dtype); });
}

}  // namespace fastattn::bindings
