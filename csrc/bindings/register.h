// What module.cpp calls; each function adds its part to fastattn._core.
#pragma once

#include "bindings/py_util.h"

namespace fastattn::bindings {

void register_attention(py::module_& m);
void register_runtime(py::module_& m);
void register_limits(py::module_& m);
void register_jax(py::module_& m);

}  // namespace fastattn::bindings
