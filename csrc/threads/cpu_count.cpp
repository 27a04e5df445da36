#include "threads/cpu_count.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fastattn {
namespace {

int affinity_cpus() noexcept {
#if defined(__linux__)
    // The kernel refuses a mask shorter than its own: try longer ones.
    for (int cpus = CPU_SETSIZE; cpus <= 1 << 20; cpus *= 4) {
        cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(cpus));
        if (set == nullptr) break;
        const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(cpus));
        const int count = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (count > 0) return count;
    }
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// CPUs that one cgroup folder grants; 0: no limit there.
double folder_quota(const std::string& folder, bool v2) {
    double quota = 0, period = 0;
    if (v2) {
        std::ifstream file(folder + "/cpu.max");  // "max 100000" or "150000 100000"
        if (!(file >> quota >> period)) return 0;
    } else {
        std::ifstream quota_file(folder + "/cpu.cfs_quota_us"), period_file(folder + "/cpu.cfs_period_us");
        if (!(quota_file >> quota) || !(period_file >> period)) return 0;  // -1: no limit
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

// The tightest quota from `path` up to the mount point. Inside a container the path may be the host's
// and not exist here; the mount point then is the container's own group.
double tightest_quota(const std::string& mount, std::string path, bool v2) {
    double tightest = 0;
    while (true) {
        const double quota = folder_quota(mount + path, v2);
        if (quota > 0 && (tightest == 0 || quota < tightest)) tightest = quota;
        if (path.empty()) return tightest;
        const auto slash = path.rfind('/');
        path.resize(slash == std::string::npos ? 0 : slash);
    }
}

bool has_item(const std::string& list, const std::string& item) {
    return ("," + list + ",").find("," + item + ",") != std::string::npos;
}

}  // namespace

double cgroup_cpu_quota(const std::string& proc_cgroup, const std::string& root) {
    double tightest = 0;
    std::istringstream lines(proc_cgroup);
    for (std::string line; std::getline(lines, line);) {  // "hierarchy:controllers:path"
        const auto first = line.find(':');
        const auto second = first == std::string::npos ? first : line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        std::string path = line.substr(second + 1);
        if (path == "/") path.clear();
        double quota = 0;
        if (controllers.empty()) {
            quota = tightest_quota(root, path, true);
        } else if (has_item(controllers, "cpu")) {
            quota = tightest_quota(root + "/" + controllers, path, false);
            if (quota == 0) quota = tightest_quota(root + "/cpu", path, false);
        }
        if (quota > 0 && (tightest == 0 || quota < tightest)) tightest = quota;
    }
    return tightest;
}

int usable_cpus() noexcept {
    int cpus = affinity_cpus();
#if defined(__linux__)
    try {
        std::ifstream file("/proc/self/cgroup");
        std::stringstream text;
        text << file.rdbuf();
        const double quota = cgroup_cpu_quota(text.str(), "/sys/fs/cgroup");
        if (quota > 0 && quota < cpus) cpus = static_cast<int>(std::ceil(quota));
    } catch (...) {  // no memory for a few strings: the affinity will do
    }
#endif
    return std::max(1, cpus);
}

}  // namespace fastattn
