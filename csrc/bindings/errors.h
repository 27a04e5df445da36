// C++ exceptions as Python ones.
#pragma once

#include "bindings/py_util.h"

namespace fastattn::bindings {

// Adds fastattn.UnsupportedError and fastattn.CudaError to the module, and has pybind11 translate the core's
// exceptions to them.
void add_exceptions(py::module_& m);

// Inside a catch block: sets the Python error that the current exception stands for. `module` is
// fastattn._core of this interpreter.
void set_python_error(PyObject* module);

}  // namespace fastattn::bindings
