// NumPy arrays as TensorViews, without NumPy's headers: pybind11's proxies of the array struct, whose
// layout is NumPy's stable ABI (1.x and 2.x).
#pragma once

#include <cstdint>
#include <optional>

#include <fastattn/tensor_view.h>

#include "bindings/buffer.h"
#include "bindings/py_util.h"

namespace fastattn::bindings {

bool is_ndarray(PyObject* object);  // subclasses too

// The view of an ndarray; `name` is the argument for messages. Throws PythonError (TypeError) for a
// masked array, a foreign byte order, or a dtype that DType does not have.
// Where the addresses do not suit the dtype the result is false and `bytes` describes the array instead.
bool view_ndarray(PyObject* array, const char* name, TensorView& view, ByteStridedArray& bytes);

// A new uninitialised row-major ndarray of a float dtype; `view` becomes its view. NumPy knows bfloat16 only
// through the descriptor of an array that has it, so for that dtype `q` must be one. MemoryError names the
// bytes.
PyRef new_ndarray(const char* name, PyObject* q, DType dtype, int rank, const std::int64_t* shape,
                  TensorView& view);

// 0-d arrays count as scalars.
bool is_zero_dim_ndarray(PyObject* object);
bool is_numpy_bool(PyObject* object);

}  // namespace fastattn::bindings
