// Keeps a worker off its caller's CPU. A scheduler may leave both there for milliseconds - longer than most
// calls - because at the moment of the wake-up some thread of another library was still spinning elsewhere.
#pragma once

#if defined(__linux__)
#include <sched.h>
#include <sys/types.h>
#endif

namespace fastattn {

// The CPU that this thread runs on; -1 where the system does not say.
int current_cpu() noexcept;

// Where one worker may run: wherever its affinity allows but on one CPU. All calls under the pool's mutex.
class CpuPlacement {
public:
    // On the worker's own thread, before all else.
    void start() noexcept;
    // From now on the worker stays off this CPU, unless that is the only one it has. An affinity that
    // somebody else has given it meanwhile is kept. Where the system refuses, nothing changes.
    void leave(int cpu) noexcept;

private:
#if defined(__linux__)
    pid_t thread_ = 0;
    int left_ = -1;
    cpu_set_t given_{}, set_{};  // by others; by us
#endif
};

}  // namespace fastattn
