// fastattn._core. Nothing of Python is kept in statics, so that every interpreter, with a GIL of its own or
// without one, can have this module.
#include "bindings/buffer.h"
#include "bindings/errors.h"
#include "bindings/register.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m, py::mod_gil_not_used(), py::multiple_interpreters::per_interpreter_gil()) {
    using namespace fastattn::bindings;
    m.doc() = "The compiled part of fastattn; use the package itself.";
    add_exceptions(m);
    register_buffer(m);
    register_runtime(m);
    register_attention(m);
    register_limits(m);
    register_jax(m);
}
