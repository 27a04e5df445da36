#include "threads/cpu_placement.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {

#if defined(__linux__)

int current_cpu() noexcept { return sched_getcpu(); }

void CpuPlacement::start() noexcept { thread_ = static_cast<pid_t>(syscall(SYS_gettid)); }

void CpuPlacement::leave(int cpu) noexcept {
    if (thread_ == 0 || cpu < 0 || cpu >= CPU_SETSIZE || cpu == left_) return;
    cpu_set_t now;
    if (sched_getaffinity(thread_, sizeof now, &now) != 0) return;
    if (left_ < 0 || !CPU_EQUAL(&now, &set_)) given_ = now;
    cpu_set_t wanted = given_;
    CPU_CLR(static_cast<unsigned>(cpu), &wanted);
    if (CPU_COUNT(&wanted) == 0) wanted = given_;
    const bool refused = !CPU_EQUAL(&now, &wanted) && sched_setaffinity(thread_, sizeof wanted, &wanted) != 0;
    set_ = refused ? now : wanted;
    left_ = refused ? left_ : cpu;
}

#else

int current_cpu() noexcept { return -1; }
void CpuPlacement::start() noexcept {}
void CpuPlacement::leave(int) noexcept {}

#endif

}  // namespace fastattn
