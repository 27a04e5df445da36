// Runs one (DISABLED_) test of this binary in a fresh process, for what is read once per process.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace fastattn::testing {

struct ChildResult {
    bool started = false;  // false where a binary cannot start itself, as under an emulator
    bool passed = false;   // the test ran, and passed
    std::string output;    // stdout and stderr
};

inline ChildResult run_test_in_child(const std::string& test,
                                     const std::vector<std::pair<std::string, std::string>>& environment) {
    constexpr int kNoExec = 77;
    ChildResult result;
    int ends[2];
    if (pipe(ends) != 0) return result;
    const std::string filter = "--gtest_filter=" + test;
    const pid_t child = fork();
    if (child == 0) {
        for (const auto& [name, value] : environment) setenv(name.c_str(), value.c_str(), 1);
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        execl("/proc/self/exe", "test", filter.c_str(), "--gtest_also_run_disabled_tests", nullptr);
        _exit(kNoExec);
    }
    close(ends[1]);
    char text[4096];
    for (ssize_t n = 0; (n = read(ends[0], text, sizeof text)) > 0;)
        result.output.append(text, static_cast<std::size_t>(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    result.started = !(WIFEXITED(status) && WEXITSTATUS(status) == kNoExec);
    result.passed = WIFEXITED(status) && WEXITSTATUS(status) == 0 &&
                    result.output.find("[  PASSED  ] 1 test.") != std::string::npos;
    return result;
}

}  // namespace fastattn::testing
