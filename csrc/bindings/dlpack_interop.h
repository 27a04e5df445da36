// Consumer of DLPack: arrays of other libraries as TensorViews, without a copy.
#pragma once

#include <utility>

#include <fastattn/tensor_view.h>

#include "bindings/buffer.h"
#include "bindings/cuda_use.h"
#include "bindings/dlpack_abi.h"
#include "bindings/py_util.h"

namespace fastattn::bindings {

// A tensor that a producer lent us: its deleter is called exactly once, when this goes.
class ManagedTensor {
public:
    ManagedTensor() = default;
    explicit ManagedTensor(dlpack::DLManagedTensor* legacy) noexcept : legacy_(legacy) {}
    explicit ManagedTensor(dlpack::DLManagedTensorVersioned* versioned) noexcept : versioned_(versioned) {}
    ManagedTensor(ManagedTensor&& other) noexcept
        : legacy_(std::exchange(other.legacy_, nullptr)),
          versioned_(std::exchange(other.versioned_, nullptr)) {}
    ManagedTensor& operator=(ManagedTensor&&) = delete;
    ManagedTensor(const ManagedTensor&) = delete;
    ManagedTensor& operator=(const ManagedTensor&) = delete;
    ~ManagedTensor();  // needs the GIL: the deleter may be Python's

    bool versioned() const noexcept { return versioned_ != nullptr; }
    dlpack::DLPackVersion version() const noexcept { return versioned_->version; }
    std::uint64_t flags() const noexcept { return versioned_ != nullptr ? versioned_->flags : 0; }
    const dlpack::DLTensor& tensor() const noexcept {
        return versioned_ != nullptr ? versioned_->dl_tensor : legacy_->dl_tensor;
    }

private:
    dlpack::DLManagedTensor* legacy_ = nullptr;
    dlpack::DLManagedTensorVersioned* versioned_ = nullptr;
};

bool has_dlpack(PyObject* object);

// TypeError for a tensor that requires grad: what is computed here has no derivative.
void check_requires_grad(PyObject* object, const char* name);

// Imports `object`, which has __dlpack__; a tensor whose numbers PyTorch would negate when they are read is
// copied, or as an output refused. `aligned` as in view_ndarray(): when false, `bytes` describes the array.
// An array on a CUDA device joins `cuda`. Throws PythonError (TypeError: a tensor that requires grad, lanes,
// a dtype that DType does not have, a producer that breaks the protocol) or UnsupportedError (a device that
// this build cannot use).
ManagedTensor import_dlpack(PyObject* object, const char* name, bool for_output, TensorView& view,
                            bool& aligned, ByteStridedArray& bytes, CudaUse& cuda);

}  // namespace fastattn::bindings
