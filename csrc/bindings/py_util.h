// Small tools over the CPython API: an owning reference, and errors as C++ exceptions.
//
// mha and explain are raw C functions (pybind11's keyword dispatch alone costs more than their whole
// budget), so this layer speaks CPython; pybind11 serves where speed does not matter.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

namespace fastattn::bindings {

namespace py = pybind11;

// Thrown while a Python error is set; the outermost frame returns nullptr.
struct PythonError {};

// An owned reference.
class PyRef {
public:
    PyRef() = default;
    PyRef(PyRef&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    PyRef& operator=(PyRef&& other) noexcept {
        if (this != &other) {
            Py_XDECREF(std::exchange(object_, std::exchange(other.object_, nullptr)));
        }
        return *this;
    }
    PyRef(const PyRef&) = delete;
    PyRef& operator=(const PyRef&) = delete;
    ~PyRef() { Py_XDECREF(object_); }

    static PyRef steal(PyObject* object) noexcept { return PyRef(object); }
    static PyRef borrow(PyObject* object) noexcept {
        Py_XINCREF(object);
        return PyRef(object);
    }
    // For calls that return nullptr with an error set.
    static PyRef checked(PyObject* object) {
        if (object == nullptr) {
            throw PythonError{};
        }
        return PyRef(object);
    }

    PyObject* get() const noexcept { return object_; }
    PyObject* release() noexcept { return std::exchange(object_, nullptr); }
    explicit operator bool() const noexcept { return object_ != nullptr; }

private:
    explicit PyRef(PyObject* object) noexcept : object_(object) {}
    PyObject* object_ = nullptr;
};

// PyErr_Format, then throws. The format is CPython's: %s, %zd, %R (repr), %.200s ...
template <class... Args>
[[noreturn]] void raise(PyObject* type, const char* format, Args... args) {
    PyErr_Format(type, format, args...);
    throw PythonError{};
}

// The same, with the error that is set now as its __cause__.
template <class... Args>
[[noreturn]] void raise_from(PyObject* type, const char* format, Args... args) {
    py::error_already_set cause;  // takes the error that is set
    PyErr_Format(type, format, args...);
    py::error_already_set error;
    error.value().attr("__cause__") = cause.value();
    error.restore();
    throw PythonError{};
}

inline const char* type_name(PyObject* object) noexcept { return Py_TYPE(object)->tp_name; }

// Saves an error that is set, so that foreign code can run, and puts it back.
class ErrorSaver {
public:
#if PY_VERSION_HEX >= 0x030C0000
    ErrorSaver() noexcept : error_(PyErr_GetRaisedException()) {}
    ~ErrorSaver() { PyErr_SetRaisedException(error_); }

private:
    PyObject* error_;
#else
    ErrorSaver() noexcept { PyErr_Fetch(&type_, &value_, &traceback_); }
    ~ErrorSaver() { PyErr_Restore(type_, value_, traceback_); }

private:
    PyObject *type_ = nullptr, *value_ = nullptr, *traceback_ = nullptr;
#endif
public:
    ErrorSaver(const ErrorSaver&) = delete;
    ErrorSaver& operator=(const ErrorSaver&) = delete;
};

// The attribute, or an empty reference where there is none (other errors throw).
inline PyRef optional_attribute(PyObject* object, const char* name) {
    PyRef value = PyRef::steal(PyObject_GetAttrString(object, name));
    if (!value) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            throw PythonError{};
        }
        PyErr_Clear();
    }
    return value;
}

// A module that somebody has imported already, or an empty reference; never imports.
inline PyRef imported_module(const char* name) {
    const PyRef key = PyRef::checked(PyUnicode_FromString(name));
    PyRef module = PyRef::steal(PyImport_GetModule(key.get()));
    if (!module && PyErr_Occurred() != nullptr) {
        throw PythonError{};
    }
    return module;
}

}  // namespace fastattn::bindings
