// The arguments of the functions on attention: (q, k, v, *, keywords...), as CPython hands them to a
// METH_FASTCALL | METH_KEYWORDS function, and their conversion.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <fastattn/tensor_view.h>

#include "bindings/py_util.h"

namespace fastattn::bindings {

enum Slot {
#define FASTATTN_ARGUMENT(name, slot, ...) slot,
#include "core/arguments.inc"
#undef FASTATTN_ARGUMENT
    kSlots,
};

// How a function takes an argument.
enum class Taken { none, position, name };

// A row of core/arguments.inc.
struct ArgumentRow {
    std::string_view name;
    const char* fallback;
    Taken forward, explain, backward, varlen, varlen_backward;
};
inline constexpr ArgumentRow kArguments[] = {
#define FASTATTN_ARGUMENT(name, slot, fallback, forward, explain, backward, varlen, varlen_backward) \
    {#name, fallback, Taken::forward, Taken::explain, Taken::backward, Taken::varlen, Taken::varlen_backward},
#include "core/arguments.inc"
#undef FASTATTN_ARGUMENT
};

// What a function takes: some arguments by position or name, the first ones of them required, the others by
// name.
struct Signature {
    const char* function;
    Taken ArgumentRow::* taken;
    Slot positional[8];
    int required_count, positional_count;

    constexpr bool takes(int slot) const noexcept { return kArguments[slot].*taken != Taken::none; }
};
inline constexpr Signature kForwardSignature = {"mha", &ArgumentRow::forward, {kQ, kK, kV}, 3, 3};
inline constexpr Signature kExplainSignature = {"explain", &ArgumentRow::explain, {kQ, kK, kV}, 3, 3};
inline constexpr Signature kBackwardSignature = {
    "mha_backward", &ArgumentRow::backward, {kDout, kQ, kK, kV, kOut, kLse}, 6, 6};
inline constexpr Signature kVarlenSignature = {
    "mha_varlen", &ArgumentRow::varlen, {kQ, kK, kV, kCuQ, kCuKv}, 4, 5};
inline constexpr Signature kVarlenBackwardSignature = {
    "mha_varlen_backward", &ArgumentRow::varlen_backward, {kDout, kQ, kK, kV, kOut, kLse, kCuQ, kCuKv}, 7, 8};

// The first line of a docstring, which inspect.signature() reads, and the end of that part.
std::string signature_text(const Signature& signature);

// Borrowed references; nullptr: not given. None counts as not given for keywords whose default is None.
struct Arguments {
    PyObject* values[kSlots] = {};

    PyObject* operator[](Slot slot) const noexcept { return values[slot]; }
    // Given and not None.
    bool given(Slot slot) const noexcept { return values[slot] != nullptr && values[slot] != Py_None; }
};

const char* slot_name(Slot slot) noexcept;

// Sorts the arguments into slots; TypeError, in CPython's words, for too many, missing, unknown or repeated
// ones.
Arguments parse_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t count,
                          PyObject* keywords);

// Conversions. `fallback` is what an absent argument means.
bool to_bool(const Arguments& arguments, Slot slot, bool fallback);
double to_double(const Arguments& arguments, Slot slot, double fallback);
// Text of a str argument, alive as long as the argument; nullptr when not given.
const char* to_text(const Arguments& arguments, Slot slot);
// A float dtype, by its name, as NumPy's, or of another library.
DType to_float_dtype(const Arguments& arguments, Slot slot);
std::uint64_t to_seed(const Arguments& arguments);
// (left, right)
void to_window(const Arguments& arguments, std::optional<std::int64_t>& left,
               std::optional<std::int64_t>& right);
// True for what stands for one integer rather than an array of them.
bool is_integer_scalar(PyObject* object);
std::int64_t to_int64(PyObject* object, const char* name);

}  // namespace fastattn::bindings
