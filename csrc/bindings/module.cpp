// fastattn._core. Nothing of Python is kept in statics, so that every interpreter, with a GIL of its own or
// without one, can have this module.
#include "bindings/buffer.h"
#include "bindings/errors.h"
#include "bindings/register.h"

namespace py = pybind11;

PYBIND11_MODULE(_core_by_pybind11, m, py::mod_gil_not_used(),
                py::multiple_interpreters::per_interpreter_gil()) {
    using namespace fastattn::bindings;
    m.doc() = "The compiled part of fastattn; use the package itself.";
    add_exceptions(m);
    register_buffer(m);
    register_runtime(m);
    register_attention(m);
    register_limits(m);
    register_jax(m);
}

// What CPython calls. Before 3.12 pybind11 would wait for the GIL of the main interpreter, forever.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
#if PY_VERSION_HEX < 0x030C0000
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(
            PyExc_ImportError,
            "fastattn: a sub-interpreter can import it as of Python 3.12, and this is Python " PY_VERSION
            "; here import it in the main interpreter (threads and processes are fine)");
        return nullptr;
    }
#endif
    return PyInit__core_by_pybind11();
}
