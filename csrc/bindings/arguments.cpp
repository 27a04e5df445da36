#include "bindings/arguments.h"

#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include <fastattn/attention.h>

#include "bindings/dlpack_interop.h"
#include "bindings/numpy_interop.h"

namespace fastattn::bindings {
namespace {

// By content: interned pointers would have to be kept per interpreter, and some short comparisons that fail
// at the length or the first letters cost nanoseconds.
int find_slot(std::string_view name) noexcept {
    for (int slot = 0; slot < kSlots; ++slot) {
        if (kArguments[slot].name == name) {
            return slot;
        }
    }
    return -1;
}

[[noreturn]] void fail_missing(const Signature& signature, const Arguments& arguments) {
    std::string missing[std::size(Signature{}.positional)];
    int count = 0;
    for (int i = 0; i < signature.required_count; ++i) {
        if (arguments.values[signature.positional[i]] == nullptr) {
            missing[count++] = "'" + std::string(kArguments[signature.positional[i]].name) + "'";
        }
    }
    std::string list = missing[0];
    for (int i = 1; i < count; ++i) {
        list += (i + 1 < count ? ", " : count > 2 ? ", and " : " and ") + missing[i];
    }
    raise(PyExc_TypeError, "%s() missing %d required positional argument%s: %s", signature.function, count,
          count == 1 ? "" : "s", list.c_str());
}

[[noreturn]] void fail_type(const char* name, const char* expected, PyObject* got) {
    raise(PyExc_TypeError, "%s: expected %s, got %.200s", name, expected, type_name(got));
}

// An integer, saturated to 64 bits.
std::int64_t to_saturated(PyObject* object, const char* name, const char* expected, bool& overflowed) {
    if (!PyIndex_Check(object)) {
        fail_type(name, expected, object);
    }
    const PyRef index = PyRef::checked(PyNumber_Index(object));
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(index.get(), &overflow);
    if (value == -1 && overflow == 0 && PyErr_Occurred() != nullptr) {
        throw PythonError{};
    }
    overflowed = overflow != 0;
    if (overflow != 0) {
        return overflow > 0 ? std::numeric_limits<std::int64_t>::max()
                            : std::numeric_limits<std::int64_t>::min();
    }
    return value;
}

}  // namespace

const char* slot_name(Slot slot) noexcept { return kArguments[slot].name.data(); }

std::string signature_text(const Signature& signature) {
    std::string text = std::string(signature.function) + "($module";
    for (int i = 0; i < signature.positional_count; ++i) {
        const ArgumentRow& row = kArguments[signature.positional[i]];
        text += ", " + std::string(row.name);
        if (i >= signature.required_count) {
            text += std::string("=") + row.fallback;
        }
    }
    text += ", *";
    for (const ArgumentRow& row : kArguments) {
        if (row.*signature.taken == Taken::name) {
            text += ", " + std::string(row.name) + "=" + row.fallback;
        }
    }
    return text + ")\n--\n\n";
}

Arguments parse_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t count,
                          PyObject* keywords) {
    Arguments arguments;
    if (count > signature.positional_count) {
        raise(PyExc_TypeError, "%s() takes %d positional arguments but %zd were given", signature.function,
              signature.positional_count, count);
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        arguments.values[signature.positional[i]] = args[i];
    }
    const Py_ssize_t keyword_count = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
    for (Py_ssize_t i = 0; i < keyword_count; ++i) {
        PyObject* keyword = PyTuple_GET_ITEM(keywords, i);
        Py_ssize_t length = 0;
        const char* text = PyUnicode_AsUTF8AndSize(keyword, &length);
        if (text == nullptr) {
            PyErr_Clear();  // lone surrogates: certainly none of ours
        }
        const int slot = text == nullptr ? -1 : find_slot({text, static_cast<std::size_t>(length)});
        if (slot < 0 || !signature.takes(slot)) {
            raise(PyExc_TypeError, "%s() got an unexpected keyword argument %R", signature.function, keyword);
        }
        if (arguments.values[slot] != nullptr) {
            raise(PyExc_TypeError, "%s() got multiple values for argument '%s'", signature.function,
                  kArguments[slot].name.data());
        }
        arguments.values[slot] = args[count + i];
    }
    for (int i = 0; i < signature.required_count; ++i) {
        if (arguments.values[signature.positional[i]] == nullptr) {
            fail_missing(signature, arguments);
        }
    }
    return arguments;
}

bool to_bool(const Arguments& arguments, Slot slot, bool fallback) {
    PyObject* object = arguments[slot];
    if (object == nullptr) {
        return fallback;
    }
    if (object == Py_True || object == Py_False) {
        return object == Py_True;
    }
    if (!is_numpy_bool(object)) {
        fail_type(slot_name(slot), "a bool", object);
    }
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) {
        throw PythonError{};
    }
    return truth != 0;
}

double to_double(const Arguments& arguments, Slot slot, double fallback) {
    PyObject* object = arguments[slot];
    if (object == nullptr) {
        return fallback;
    }
    if (PyFloat_CheckExact(object)) {
        return PyFloat_AS_DOUBLE(object);
    }
    const PyNumberMethods* number = Py_TYPE(object)->tp_as_number;
    const bool is_number = number != nullptr && (number->nb_float != nullptr || number->nb_index != nullptr);
    // bool, complex and arrays have __float__ too, but are more likely a slip than a number.
    if (!is_number || PyBool_Check(object) || is_numpy_bool(object) || PyComplex_Check(object) ||
        (is_ndarray(object) && !is_zero_dim_ndarray(object))) {
        fail_type(slot_name(slot), "a real number", object);
    }
    if (!PyFloat_Check(object) && !PyLong_Check(object)) {
        check_requires_grad(object, slot_name(slot));
    }
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred() != nullptr) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            raise_from(PyExc_ValueError, "%s: the integer does not fit in a float64", slot_name(slot));
        }
        throw PythonError{};
    }
    return value;
}

const char* to_text(const Arguments& arguments, Slot slot) {
    PyObject* object = arguments[slot];
    if (object == nullptr || (object == Py_None && slot != kLayout)) {
        return nullptr;
    }
    if (!PyUnicode_Check(object)) {
        fail_type(slot_name(slot), slot == kLayout ? "a str" : "a str or None", object);
    }
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    if (text == nullptr || length == 0 || std::strlen(text) != static_cast<std::size_t>(length)) {
        PyErr_Clear();
        raise(PyExc_ValueError, "%s: %R is not a name", slot_name(slot), object);
    }
    return text;
}

DType to_float_dtype(const Arguments& arguments, Slot slot) {
    PyObject* object = arguments[slot];
    PyRef text = PyRef::borrow(object);
    if (!PyUnicode_Check(object)) {
        // np.dtype has a name, np.float32 and ml_dtypes' types are classes, torch.float32 has its str()
        // alone.
        PyRef name = optional_attribute(object, "name");
        if (!name) {
            name = optional_attribute(object, "__name__");
        }
        text = name ? std::move(name) : PyRef::checked(PyObject_Str(object));
    }
    const char* found = PyUnicode_Check(text.get()) ? PyUnicode_AsUTF8(text.get()) : nullptr;
    if (found != nullptr) {
        std::string_view name = found;
        if (const std::size_t dot = name.rfind('.');
            dot != std::string_view::npos && !PyUnicode_Check(object)) {
            name.remove_prefix(dot + 1);
        }
        for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
            if (name == dtype_name(dtype)) {
                return dtype;
            }
        }
    }
    PyErr_Clear();
    raise(PyExc_TypeError, "%s: expected float64, float32, float16 or bfloat16, got %R", slot_name(slot),
          object);
}

std::uint64_t to_seed(const Arguments& arguments) {
    PyObject* object = arguments[kSeed];
    if (object == nullptr) {
        return 0;
    }
    if (!PyIndex_Check(object)) {
        fail_type("seed", "an int", object);
    }
    const PyRef index = PyRef::checked(PyNumber_Index(object));
    const unsigned long long value = PyLong_AsUnsignedLongLong(index.get());
    if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            throw PythonError{};
        }
        PyErr_Clear();
        raise(PyExc_ValueError, "seed: expected 0 <= seed < 2**64, got %R", index.get());
    }
    return value;
}

void to_window(const Arguments& arguments, std::optional<std::int64_t>& left,
               std::optional<std::int64_t>& right) {
    PyObject* object = arguments[kWindow];
    constexpr const char* kExpected = "(left, right), each an int >= 0 or None";
    if (!PyTuple_Check(object) && !PyList_Check(object)) {
        fail_type("window", kExpected, object);
    }
    // A list may change while __index__ runs; a tuple of it may not.
    const PyRef pair = PyRef::checked(PySequence_Tuple(object));
    if (PyTuple_GET_SIZE(pair.get()) != 2) {
        raise(PyExc_ValueError, "window: expected %s, got %zd items", kExpected,
              PyTuple_GET_SIZE(pair.get()));
    }
    std::optional<std::int64_t>* sides[] = {&left, &right};
    for (Py_ssize_t i = 0; i < 2; ++i) {
        PyObject* side = PyTuple_GET_ITEM(pair.get(), i);
        if (side != Py_None) {
            bool overflowed = false;  // a window wider than 2**63 is as wide as one of 2**63
            *sides[i] = to_saturated(side, "window", kExpected, overflowed);
        }
    }
}

bool is_integer_scalar(PyObject* object) {
    if (PyLong_Check(object)) {
        return true;
    }
    if (is_ndarray(object)) {
        return is_zero_dim_ndarray(object);
    }
    return PyIndex_Check(object) && !has_dlpack(object);
}

std::int64_t to_int64(PyObject* object, const char* name) {
    bool overflowed = false;
    const std::int64_t value =
        to_saturated(object, name, "an int or an integer array of shape (B,)", overflowed);
    if (overflowed) {
        raise(PyExc_ValueError, "%s: expected an int of at most 64 bits, got %R", name, object);
    }
    return value;
}

}  // namespace fastattn::bindings
