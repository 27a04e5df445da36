#include "bindings/errors.h"

#include <cxxabi.h>

#include <exception>
#include <new>

#include <fastattn/attention.h>

namespace fastattn::bindings {
namespace {

void add_exception(py::module_& m, const char* name, const char* qualified_name, const char* doc,
                   PyObject* base) {
    py::object type =
        py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(qualified_name, doc, base, nullptr));
    if (!type) {
        throw py::error_already_set();
    }
    m.add_object(name, type);
}

// An exception class of this module.
void set_own_error(PyObject* module, const char* name, const char* text) {
    const PyRef type = PyRef::steal(PyObject_GetAttrString(module, name));
    if (type) {
        PyErr_SetString(type.get(), text);
    }
}

void translate(PyObject* module) {
    try {
        throw;
    } catch (const PythonError&) {
        // set already
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const UnsupportedError& error) {
        set_own_error(module, "UnsupportedError", error.what());
    } catch (const CudaError& error) {
        set_own_error(module, "CudaError", error.what());
    } catch (const ValueError& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const TypeError& error) {
        PyErr_SetString(PyExc_TypeError, error.what());
    } catch (const OutOfMemory& error) {
        PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const Cancelled&) {
        // Normally the signal handler's own exception is set.
        if (PyErr_Occurred() == nullptr) {
            PyErr_SetNone(PyExc_KeyboardInterrupt);
        }
    } catch (const std::bad_alloc&) {
        PyErr_SetString(PyExc_MemoryError, "fastattn: no memory for the bookkeeping of this call");
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
#if defined(__GLIBCXX__)
    catch (const abi::__forced_unwind&) {  // pthread_cancel(): not ours to stop
        throw;
    }
#endif
    catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "fastattn: an unknown C++ exception");
    }
}

}  // namespace

void add_exceptions(py::module_& m) {
    add_exception(m, "UnsupportedError", "fastattn.UnsupportedError",
                  "A kernel or device that was asked for by name cannot do the job; the message says why.",
                  PyExc_ValueError);
    add_exception(m, "CudaError", "fastattn.CudaError",
                  "A CUDA call failed. Where the message says so, the process must be restarted.",
                  PyExc_RuntimeError);
    py::register_local_exception_translator([](std::exception_ptr exception) {
        try {
            std::rethrow_exception(exception);
        } catch (const PythonError&) {
            // set already
        } catch (const Error&) {
            const PyRef module = PyRef::steal(PyImport_ImportModule("fastattn._core"));
            if (module) {
                set_python_error(module.get());
            }
        }
    });
}

void set_python_error(PyObject* module) {
    stay_if_leaving();
    try {
        translate(module);
    } catch (...) {  // setting an error allocates, and that may run the garbage collector
        stay_if_leaving();
        throw;
    }
}

}  // namespace fastattn::bindings
