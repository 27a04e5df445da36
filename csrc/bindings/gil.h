// Computing without the GIL, and being interrupted meanwhile.
#pragma once

#include "bindings/leaving.h"
#include "bindings/py_util.h"

namespace fastattn::bindings {

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
        } catch (...) {  // our caller, the thread pool, is noexcept
            stay_if_leaving();
            throw;
        }
        self.state_ = PyEval_SaveThread();
        return stop;
    }

private:
    enum class Thread { unknown, main, other };

    // A thread that comes back while the interpreter shuts down stays here, whether it finds out before it
    // waits for the GIL or, by the start of the unwinding, afterwards. (The thread that shuts down never gets
    // here: it keeps the GIL, see may_release_gil.)
    void attach() noexcept {
        if (interpreter_is_finalizing()) sleep_forever();
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            sleep_forever();
        }
    }

    // False with a Python error set: this runs Python code, in which a signal handler may raise. That error
    // is the caller's; swallowing it would lose a Ctrl-C.
    bool ask_which_thread() {
        try {
            const PyRef threading = PyRef::checked(PyImport_ImportModule("threading"));
            const PyRef main = PyRef::checked(PyObject_CallMethod(threading.get(), "main_thread", nullptr));
            const PyRef main_ident = PyRef::checked(PyObject_GetAttrString(main.get(), "ident"));
            const PyRef ident = PyRef::checked(PyObject_CallMethod(threading.get(), "get_ident", nullptr));
            const int is_main = PyObject_RichCompareBool(main_ident.get(), ident.get(), Py_EQ);
            if (is_main < 0) return false;
            thread_ = is_main != 0 ? Thread::main : Thread::other;
            return true;
        } catch (const PythonError&) {
            return false;
        }
    }

    PyThreadState* state_;
    Thread thread_ = Thread::unknown;
};

// Whether the calling thread may detach: not while it is shutting the interpreter down itself.
inline bool may_release_gil() noexcept { return !interpreter_is_finalizing(); }

// f(), without the GIL where it may be released.
template <class F>
auto without_gil(const F& f) {
    if (!may_release_gil()) return f();
    const WithoutGil detached;
    return f();
}

}  // namespace fastattn::bindings
