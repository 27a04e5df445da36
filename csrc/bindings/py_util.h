// Small tools over the CPython API: an owning reference, and errors as C++ exceptions.
//
// mha and explain are raw C functions (pybind11's keyword dispatch alone costs more than their whole
// budget), so this layer speaks CPython; pybind11 serves where speed does not matter.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "bindings/leaving.h"

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
            PyRef old = PyRef(std::exchange(object_, std::exchange(other.object_, nullptr)));
        }
        return *this;
    }
    PyRef(const PyRef&) = delete;
    PyRef& operator=(const PyRef&) = delete;
    ~PyRef() {
        if (object_ != nullptr) in_destructor([this] { Py_DECREF(object_); });
    }

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

// The error that is set, which it is no longer then.
inline PyRef take_error() {
#if PY_VERSION_HEX >= 0x030C0000
    return PyRef::steal(PyErr_GetRaisedException());
#else
    PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    const PyRef own_type = PyRef::steal(type), own_traceback = PyRef::steal(traceback);
    PyRef error = PyRef::steal(value);
    if (traceback != nullptr) {
        PyException_SetTraceback(value, traceback);
    }
    return error;
#endif
}

// Sets it again.
inline void set_error(PyRef error) {
#if PY_VERSION_HEX >= 0x030C0000
    PyErr_SetRaisedException(error.release());
#else
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(error.get()));
    Py_INCREF(type);
    PyObject* traceback = PyException_GetTraceback(error.get());
    PyErr_Restore(type, error.release(), traceback);
#endif
}

// The same, with the error that is set now as its __cause__.
template <class... Args>
[[noreturn]] void raise_from(PyObject* type, const char* format, Args... args) {
    PyRef cause = take_error();
    PyErr_Format(type, format, args...);
    PyRef error = take_error();
    PyException_SetCause(error.get(), cause.release());
    set_error(std::move(error));
    throw PythonError{};
}

inline const char* type_name(PyObject* object) noexcept { return Py_TYPE(object)->tp_name; }

// Saves an error that is set, so that foreign code can run, and puts it back.
class ErrorSaver {
public:
#if PY_VERSION_HEX >= 0x030C0000
    ErrorSaver() noexcept : error_(PyErr_GetRaisedException()) {}
    ~ErrorSaver() {
        in_destructor([this] { PyErr_SetRaisedException(error_); });
    }

private:
    PyObject* error_;
#else
    ErrorSaver() noexcept { PyErr_Fetch(&type_, &value_, &traceback_); }
    ~ErrorSaver() {
        in_destructor([this] { PyErr_Restore(type_, value_, traceback_); });
    }

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
