// The arguments of mha, explain and mha_backward: (q, k, v, *, keywords...), as CPython hands them to a
// METH_FASTCALL | METH_KEYWORDS function, and their conversion.
#pragma once

#include <cstdint>
#include <optional>

#include "bindings/py_util.h"

namespace fastattn::bindings {

enum Slot {
    kQ,
    kK,
    kV,
    kLayout,
    kScale,
    kCausal,
    kWindow,
    kQOffset,
    kMask,
    kBias,
    kAlibiSlopes,
    kSoftcap,
    kSinks,
    kQLens,
    kKvLens,
    kDropout,
    kSeed,
    kReturnLse,
    kReturnWeights,
    kOut,
    kDevice,
    kKernel,
    kDout,
    kLse,
    kDlse,
    kNeedDbias,
    kSlots,
};

// What a function takes: some arguments by position or name, the others by name.
struct Signature {
    const char* function;
    Slot positional[6];
    int positional_count;
    std::uint32_t by_name;  // a bit for each slot
};
inline constexpr Signature forward_signature(const char* function) {
    return {function, {kQ, kK, kV}, 3, ((1u << kDout) - 1u)};
}
inline constexpr Signature kBackwardSignature = {
    "mha_backward",
    {kDout, kQ, kK, kV, kOut, kLse},
    6,
    ((1u << kSlots) - 1u) & ~((1u << kReturnLse) | (1u << kReturnWeights))};

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
std::uint64_t to_seed(const Arguments& arguments);
// (left, right)
void to_window(const Arguments& arguments, std::optional<std::int64_t>& left,
               std::optional<std::int64_t>& right);
// True for what stands for one integer rather than an array of them.
bool is_integer_scalar(PyObject* object);
std::int64_t to_int64(PyObject* object, const char* name);

}  // namespace fastattn::bindings
