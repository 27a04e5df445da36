// Computing without the GIL, and being interrupted meanwhile.
#pragma once

#include <chrono>
#include <thread>

#include "bindings/py_util.h"

namespace fastattn::bindings {

inline bool interpreter_is_finalizing() noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
}

// Detaches this thread from the interpreter while it lives.
class WithoutGil {
public:
    WithoutGil() noexcept : state_(PyEval_SaveThread()) {}
    ~WithoutGil() { attach(); }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

    // Poll callback of RunOptions (context: the WithoutGil): runs pending signal handlers; true once one has
    // raised. Only Python's main thread ever runs handlers, so the others give up after asking who they are.
    static bool poll(void* context) {
        auto& self = *static_cast<WithoutGil*>(context);
        if (self.thread_ == Thread::other) {
            return false;
        }
        self.attach();
        bool stop = false;
        try {
            stop = PyErr_CheckSignals() != 0;
            if (!stop && self.thread_ == Thread::unknown) {
                stop = !self.ask_which_thread();
            }
        } catch (...) {  // as in attach(): Python code gives the GIL up now and then
            if (interpreter_is_finalizing()) park();
            throw;
        }
        self.state_ = PyEval_SaveThread();
        return stop;
    }

private:
    enum class Thread { unknown, main, other };

    // A daemon thread that comes back while the interpreter shuts down would be ended by unwinding its stack without
    // the GIL, through our destructors. CPython 3.14 parks it; so do we with an older one, whether it finds out
    // before it waits for the GIL or, by the start of that unwinding, afterwards. (The thread that shuts down never
    // gets here: it keeps the GIL, see may_release_gil.)
    void attach() noexcept {
        if (interpreter_is_finalizing()) park();
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            park();
        }
    }

    [[noreturn]] static void park() noexcept {
        while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }

    // False with a Python error set: this runs Python code, in which a signal handler may raise. That error
    // is the caller's; swallowing it would lose a Ctrl-C.
    bool ask_which_thread() {
        try {
            const py::module_ threading = py::module_::import("threading");
            const py::object main_ident = threading.attr("main_thread")().attr("ident");
            thread_ = main_ident.equal(threading.attr("get_ident")()) ? Thread::main : Thread::other;
            return true;
        } catch (py::error_already_set& error) {
            error.restore();
            return false;
        }
    }

    PyThreadState* state_;
    Thread thread_ = Thread::unknown;
};

// Whether the calling thread may detach: not while it is shutting the interpreter down itself.
inline bool may_release_gil() noexcept { return !interpreter_is_finalizing(); }

}  // namespace fastattn::bindings
