// Memory of ours, of the host or of a CUDA device, that arrays of other libraries can be made of: 64-byte
// aligned, row-major, shared by reference count with whoever took it through __dlpack__ or
// __array_interface__.
#pragma once

#include <cstdint>
#include <memory>

#include <fastattn/tensor_view.h>

#include "bindings/py_util.h"

namespace fastattn::bindings {

class Buffer {
public:
    // Uninitialised. Throws OutOfMemory, naming what the memory is for and the bytes, or ValueError when
    // the byte count does not fit in 63 bits.
    Buffer(const char* what_for, DType dtype, int rank, const std::int64_t* shape, Device device = {});

    const TensorView& view() const noexcept { return view_; }
    const std::shared_ptr<std::byte>& memory() const noexcept { return memory_; }

private:
    std::shared_ptr<std::byte> memory_;
    TensorView view_;
};

// Bytes of a compact array; throws ValueError, naming the array, when they do not fit in 63 bits.
std::int64_t checked_bytes(const char* name, DType dtype, int rank, const std::int64_t* shape);

// Row-major strides in elements.
void set_compact_strides(TensorView& view) noexcept;

// The half-open range of addresses that an array touches.
struct Extent {
    std::uintptr_t begin = 0, end = 0;
    bool meets(const Extent& other) const noexcept { return begin < other.end && other.begin < end; }
};

// An array whose addresses do not suit its dtype, so strides count bytes. rank <= kMaxRank.
struct ByteStridedArray {
    char* data = nullptr;
    DType dtype = DType::f32;
    int rank = 0;
    std::int64_t shape[kMaxRank] = {}, strides[kMaxRank] = {};

    Extent extent() const noexcept;
};

// An aligned copy of `source`; axes of stride 0 stay broadcast. With copy_elements == false the memory
// is left uninitialised (for outputs). `view` becomes the view of the copy.
Buffer aligned_copy(const char* name, const ByteStridedArray& source, bool copy_elements, TensorView& view);
// Writes a compact copy back.
void copy_back(const Buffer& copy, const ByteStridedArray& target);

// The Python class _core.Buffer.
void register_buffer(py::module_& m);

}  // namespace fastattn::bindings
