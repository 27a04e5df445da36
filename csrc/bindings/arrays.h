// Any Python array as a TensorView, and the results as arrays of q's kind.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <fastattn/tensor_view.h>

#include "bindings/buffer.h"
#include "bindings/dlpack_interop.h"
#include "bindings/py_util.h"

namespace fastattn::bindings {

// What has to outlive the computation beside the caller's own objects. Empty, and without any
// allocation, when all arguments are aligned NumPy arrays.
class Arrays {
public:
    TensorView input(PyObject* object, const char* name);
    // The caller's `out`.
    TensorView output(PyObject* object, const char* name);
    // The core sees aligned copies of misaligned arrays, so it cannot know that `out` shares memory with
    // one of those: these do. First, `out` with the copied inputs; then, a copied `out` with an input as the
    // core sees it.
    void check_overlap_of_copies(const TensorView& out) const;
    void check_overlap_with_copy(const char* name, const TensorView& input) const;
    CudaUse& cuda() noexcept { return cuda_; }
    // After computing: brings a misaligned `out` up to date.
    void write_back() const;

private:
    struct CopiedInput {
        const char* name;
        Extent extent;
    };
    bool view_of(PyObject* object, const char* name, bool for_output, TensorView& view,
                 ByteStridedArray& bytes);

    CudaUse cuda_;
    std::vector<ManagedTensor> lent_;
    std::vector<Buffer> copies_;
    std::vector<CopiedInput> copied_inputs_;
    std::optional<Buffer> out_copy_;
    ByteStridedArray out_bytes_;
};

// A result while it is made: memory that the core writes, then an object of q's kind.
class Result {
public:
    // On q's device. For a NumPy q that costs one allocation; otherwise fastattn._arrays is asked.
    void allocate(PyObject* q, Device device, const char* name, DType dtype, int rank,
                  const std::int64_t* shape, TensorView& view, CudaUse& cuda);
    // The finished array, once.
    PyRef take(PyObject* q);

private:
    PyRef object_;
    std::optional<Buffer> buffer_;  // for kinds that take over finished memory
    std::optional<ManagedTensor> lent_;
};

// Tells the library of a caller's `out` that it was written (nothing to do for NumPy).
void mark_written(PyObject* out);

}  // namespace fastattn::bindings
