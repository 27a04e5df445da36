// How many CPUs this process may keep busy.
#pragma once

#include <string>

namespace fastattn {

// CPUs allowed by the affinity mask and by the cgroup quota, rounded up; at least 1.
int usable_cpus() noexcept;

// The CPU quota of a cgroup and its parents, in CPUs; 0: unlimited or unknown. `proc_cgroup` is the
// text of /proc/self/cgroup, `root` the mount point /sys/fs/cgroup; v1 and v2.
double cgroup_cpu_quota(const std::string& proc_cgroup, const std::string& root);

}  // namespace fastattn
