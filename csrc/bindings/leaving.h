// What becomes of a thread that CPython asks to leave.
//
// While the interpreter shuts down, CPython before 3.14 ends every other thread that comes for the GIL, which
// any call of Python may do, by pthread_exit(). That unwinds the stack through ours: destructors would touch
// Python objects without the GIL, and the process aborts where the unwinding meets a noexcept function or a
// catch (...) that keeps it. CPython 3.14 lets such a thread sleep forever instead, and so do we with an
// older one, in the first place of ours that the unwinding reaches: every destructor that touches Python asks
// stay_if_leaving(), and so do the functions that Python calls, where they catch everything. Nothing else may
// call Python in a noexcept function or a catch (...).
#pragma once

#include <Python.h>

#include <chrono>
#include <exception>
#include <thread>

namespace fastattn::bindings {

inline bool interpreter_is_finalizing() noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

// In code that has the GIL by rights: whether it has been taken away for good.
inline bool must_leave() noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return PyThreadState_GetUnchecked() == nullptr;
#elif PY_VERSION_HEX >= 0x030C0000
    return _PyThreadState_UncheckedGet() == nullptr;
#else
    if (!interpreter_is_finalizing()) return false;
    // The state that has the GIL, in whatever thread, and that of this thread.
    const PyThreadState* current = _PyThreadState_UncheckedGet();
    return current == nullptr || current != PyGILState_GetThisThreadState();
#endif
}

[[noreturn, gnu::cold]] inline void sleep_forever() noexcept {
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
}

inline void stay_if_leaving() noexcept {
    if (must_leave()) sleep_forever();
}

// Calls Python in a destructor.
template <class F>
void in_destructor(const F& f) noexcept {
    stay_if_leaving();
    try {
        f();
    } catch (...) {
        stay_if_leaving();
        std::terminate();
    }
}

// Of a function whose frame or whose caller's holds what must not be destroyed without the GIL: pybind11's
// objects.
class StaysIfLeaving {
public:
    StaysIfLeaving() = default;
    ~StaysIfLeaving() { stay_if_leaving(); }
    StaysIfLeaving(const StaysIfLeaving&) = delete;
    StaysIfLeaving& operator=(const StaysIfLeaving&) = delete;
};

}  // namespace fastattn::bindings
