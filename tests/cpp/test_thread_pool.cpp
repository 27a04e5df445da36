#include "threads/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>
#include <vector>

#include <fastattn/attention.h>

#include "child_process.h"
#include "threads/cpu_count.h"
#include "threads/cpu_placement.h"

namespace fastattn {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

// Returns 0 from a child process that does f, the exit status of the failure otherwise; 14 (SIGALRM)
// stands for a child that hangs.
template <class F>
int in_child(F f) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        _exit(f() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

// A job that two threads must share to end: its first item waits for another item.
bool needs_two_threads() {
    ThreadPoolExecutor executor(2);
    std::atomic<int> arrived{0};
    auto item = [&](std::int64_t, int) {
        ++arrived;
        const auto deadline = Clock::now() + 10s;
        while (arrived < 2 && Clock::now() < deadline) std::this_thread::sleep_for(1ms);
    };
    const auto start = Clock::now();
    executor.for_each(2, item);
    return arrived == 2 && Clock::now() - start < 10s;
}

TEST(ThreadPool, RunsEveryItemOnceInASlotOfItsOwn) {
    for (const int threads : {1, 2, 3, 8}) {
        for (const std::int64_t items : {0, 1, 2, 7, 1000}) {
            ThreadPoolExecutor executor(threads);
            EXPECT_EQ(executor.threads(), threads);
            std::vector<std::atomic<int>> runs(static_cast<std::size_t>(items));
            std::vector<std::atomic<int>> inside(static_cast<std::size_t>(threads));
            std::atomic<int> clashes{0};
            auto item = [&](std::int64_t n, int slot) {
                if (slot < 0 || slot >= threads || inside[static_cast<std::size_t>(slot)]++ != 0) ++clashes;
                ++runs[static_cast<std::size_t>(n)];
                --inside[static_cast<std::size_t>(slot)];
            };
            executor.for_each(items, item);
            EXPECT_EQ(clashes, 0);
            for (const auto& n : runs) ASSERT_EQ(n, 1);
        }
    }
}

TEST(ThreadPool, WorkersTakePart) { EXPECT_TRUE(needs_two_threads()); }

TEST(ThreadPool, OneItemOrOneThreadStaysOnTheCaller) {
    const auto here = std::this_thread::get_id();
    for (const auto& [threads, items] : {std::pair{1, 50}, {8, 1}}) {
        ThreadPoolExecutor executor(threads);
        int elsewhere = 0;
        auto item = [&](std::int64_t, int slot) {
            elsewhere += std::this_thread::get_id() != here || slot != 0;
        };
        executor.for_each(items, item);
        EXPECT_EQ(elsewhere, 0);
    }
}

TEST(ThreadPool, ServesConcurrentCallers) {
    constexpr int callers = 16, rounds = 50, items = 40;
    std::vector<std::thread> threads;
    std::atomic<std::int64_t> total{0};
    for (int c = 0; c < callers; ++c) {
        threads.emplace_back([&] {
            for (int r = 0; r < rounds; ++r) {
                ThreadPoolExecutor executor(4);
                std::atomic<std::int64_t> sum{0};
                auto item = [&](std::int64_t n, int) { sum += n; };
                executor.for_each(items, item);
                total += sum == items * (items - 1) / 2;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(total, callers * rounds);
}

TEST(ThreadPool, CarriesTheFirstExceptionBack) {
    for (const int threads : {1, 4}) {
        ThreadPoolExecutor executor(threads);
        std::atomic<int> later{0};
        auto item = [&](std::int64_t n, int) {
            if (n == 3) throw ValueError("item 3");
            if (n > 3) {
                std::this_thread::sleep_for(1ms);
                ++later;
            }
        };
        EXPECT_THROW(executor.for_each(10000, item), ValueError);
        EXPECT_LT(later, 9000);  // the rest is dropped
        ThreadPoolExecutor next(threads);
        auto nothing = [](std::int64_t, int) {};
        EXPECT_NO_THROW(next.for_each(100, nothing));
    }
}

struct Polls {
    std::atomic<int> calls{0};
    int stop_at = 0;
    std::thread::id wanted = std::this_thread::get_id();
    std::atomic<int> on_wrong_thread{0};

    static bool poll(void* context) {
        auto& self = *static_cast<Polls*>(context);
        if (std::this_thread::get_id() != self.wanted) ++self.on_wrong_thread;
        return ++self.calls == self.stop_at;
    }
};

TEST(ThreadPool, PollStopsItemsThatAsk) {
    for (const int threads : {1, 3}) {
        for (const std::int64_t items : {1, 8}) {
            Polls polls;
            polls.stop_at = 3;
            ThreadPoolExecutor executor(threads, Polls::poll, &polls);
            auto item = [&](std::int64_t, int) {
                const auto deadline = Clock::now() + 20s;
                while (!executor.stop_requested() && Clock::now() < deadline)
                    std::this_thread::sleep_for(100us);
            };
            const auto start = Clock::now();
            EXPECT_THROW(executor.for_each(items, item), Cancelled);
            const auto took = Clock::now() - start;
            EXPECT_GE(took, 50ms);  // three polls, 20 ms apart
            EXPECT_LT(took, 5s);
            EXPECT_EQ(polls.calls, 3);
            EXPECT_EQ(polls.on_wrong_thread, 0);
            EXPECT_THROW(executor.for_each(items, item), Cancelled);  // and stays stopped
        }
    }
}

TEST(ThreadPool, PollsWhileWaitingForAWorker) {
    Polls polls;
    polls.stop_at = 3;
    ThreadPoolExecutor executor(2, Polls::poll, &polls);
    const auto here = std::this_thread::get_id();
    std::atomic<bool> worker_has_one{false};
    auto item = [&](std::int64_t, int) {
        const auto deadline = Clock::now() + 20s;
        if (std::this_thread::get_id() == here) {
            while (!worker_has_one && Clock::now() < deadline) std::this_thread::sleep_for(100us);
            return;
        }
        worker_has_one = true;
        while (!executor.stop_requested() && Clock::now() < deadline) std::this_thread::sleep_for(100us);
    };
    const auto start = Clock::now();
    EXPECT_THROW(executor.for_each(2, item), Cancelled);
    EXPECT_LT(Clock::now() - start, 1s);  // three times 20 ms, on a busy machine
    EXPECT_EQ(polls.on_wrong_thread, 0);
}

TEST(ThreadPool, ShortCallsDoNotPoll) {
    Polls polls;
    auto item = [](std::int64_t, int) {};
    for (int n = 0; n < 3; ++n) {
        ThreadPoolExecutor executor(1, Polls::poll, &polls);
        executor.for_each(1, item);
    }
    EXPECT_EQ(polls.calls, 0);
}

TEST(ThreadPool, NestedLoopsRunInlineInTheSlotOfTheirItem) {
    ThreadPoolExecutor executor(4);
    std::atomic<int> inner_items{0}, elsewhere{0};
    auto item = [&](std::int64_t, int outer_slot) {
        const auto here = std::this_thread::get_id();
        auto same = [&](std::int64_t, int slot) {
            ++inner_items;
            if (std::this_thread::get_id() != here || slot != outer_slot) ++elsewhere;
        };
        executor.for_each(5, same);
        // Another executor's slots are its own.
        ThreadPoolExecutor other(4);
        auto foreign = [&](std::int64_t, int slot) {
            ++inner_items;
            if (std::this_thread::get_id() != here || slot != 0) ++elsewhere;
        };
        other.for_each(5, foreign);
    };
    executor.for_each(20, item);
    EXPECT_EQ(inner_items, 200);
    EXPECT_EQ(elsewhere, 0);
}

TEST(ThreadPool, IdleWorkersSleep) {
    ThreadPoolExecutor executor(4);
    auto item = [](std::int64_t, int) { std::this_thread::sleep_for(1ms); };
    executor.for_each(20, item);
    const auto cpu_seconds = [] {
        rusage usage{};
        getrusage(RUSAGE_SELF, &usage);
        return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
               static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
    };
    const double before = cpu_seconds();
    std::this_thread::sleep_for(300ms);
    EXPECT_LT(cpu_seconds() - before, 0.1);
}

TEST(ThreadPool, WaitingForAWorkerSleeps) {
    ThreadPoolExecutor executor(2);
    std::atomic<bool> worker_has_one{false};
    const auto here = std::this_thread::get_id();
    timespec before{}, after{};
    auto item = [&](std::int64_t, int) {
        if (std::this_thread::get_id() == here) {
            while (!worker_has_one) std::this_thread::sleep_for(100us);
            clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
        } else {
            worker_has_one = true;
            std::this_thread::sleep_for(300ms);
        }
    };
    executor.for_each(2, item);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    EXPECT_LT(static_cast<double>(after.tv_sec - before.tv_sec) +
                  static_cast<double>(after.tv_nsec - before.tv_nsec) * 1e-9,
              0.1);
}

TEST(ThreadPool, ItemsSeeTheCallersRounding) {
    // Workers were started earlier, under the default mode.
    ASSERT_TRUE(needs_two_threads());
    std::fesetround(FE_UPWARD);
    std::atomic<int> upward{0}, arrived{0};
    ThreadPoolExecutor executor(2);
    auto item = [&](std::int64_t, int) {
        if (std::fegetround() == FE_UPWARD) ++upward;
        ++arrived;
        const auto deadline = Clock::now() + 10s;
        while (arrived < 2 && Clock::now() < deadline) std::this_thread::sleep_for(1ms);
    };
    executor.for_each(2, item);
    std::fesetround(FE_TONEAREST);
    EXPECT_EQ(upward, 2);
    EXPECT_TRUE(needs_two_threads());
}

// ---- fork -------------------------------------------------------------------------------------------
class ThreadPoolFork : public ::testing::Test {
protected:
    // Neither ThreadSanitizer nor QEMU's user mode can start any thread in the child of a process with
    // threads.
    void SetUp() override {
        std::atomic<bool> stop{false};
        std::thread other([&] {
            while (!stop) std::this_thread::sleep_for(1ms);
        });
        const int status = in_child([] {
            std::thread([] {}).join();
            return true;
        });
        stop = true;
        other.join();
        if (status != 0) GTEST_SKIP() << "plain threads do not work after a fork here";
    }
};

TEST_F(ThreadPoolFork, ChildComputesAtOnce) {
    ASSERT_TRUE(needs_two_threads());
    EXPECT_EQ(in_child(needs_two_threads), 0);
    EXPECT_EQ(in_child([] { return in_child(needs_two_threads) == 0 && needs_two_threads(); }), 0);
    EXPECT_TRUE(needs_two_threads());
}

TEST_F(ThreadPoolFork, ChildComputesWhileOtherThreadsAreBusy) {
    std::atomic<bool> stop{false};
    std::vector<std::thread> busy;
    for (int n = 0; n < 3; ++n) {
        busy.emplace_back([&] {
            auto item = [](std::int64_t, int) {};
            while (!stop) {
                ThreadPoolExecutor executor(4);
                executor.for_each(16, item);
            }
        });
    }
    for (int n = 0; n < 20; ++n) {
        EXPECT_EQ(in_child(needs_two_threads), 0);
    }
    stop = true;
    for (auto& thread : busy) thread.join();
}

TEST_F(ThreadPoolFork, AForkFromWithinACallEndsTheCallInTheChild) {
    struct Forker {
        pid_t child = -1;
        static bool poll(void* context) {
            auto& self = *static_cast<Forker*>(context);
            if (self.child < 0) {
                self.child = fork();
                if (self.child == 0) alarm(20);
            }
            return false;
        }
    } forker;
    ThreadPoolExecutor executor(3, Forker::poll, &forker);
    auto item = [&](std::int64_t, int) {
        const auto until = Clock::now() + 60ms;
        while (Clock::now() < until && !executor.stop_requested()) std::this_thread::sleep_for(1ms);
    };
    bool failed = false;
    try {
        executor.for_each(6, item);
    } catch (const Error&) {
        failed = true;
    }
    if (forker.child == 0) _exit(failed && needs_two_threads() ? 0 : 1);
    EXPECT_FALSE(failed);
    int status = -1;
    waitpid(forker.child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
}

// ---- how many threads -------------------------------------------------------------------------------
TEST(NumThreads, CanBeSet) {
    const int before = get_num_threads();
    EXPECT_GE(before, 1);
    set_num_threads(3);
    EXPECT_EQ(get_num_threads(), 3);
    EXPECT_THROW(set_num_threads(0), ValueError);
    EXPECT_THROW(set_num_threads(kMaxThreads + 1), ValueError);
    EXPECT_EQ(get_num_threads(), 3);
    set_num_threads(before);
}

extern "C" int fastattn_get_num_threads(void);
extern "C" void fastattn_set_num_threads(int n);
extern "C" const char* fastattn_version(void);

TEST(NumThreads, CFunctionsForThreadpoolctl) {
    const int before = get_num_threads();
    fastattn_set_num_threads(5);
    EXPECT_EQ(fastattn_get_num_threads(), 5);
    fastattn_set_num_threads(-3);
    EXPECT_EQ(fastattn_get_num_threads(), 1);
    EXPECT_STREQ(fastattn_version(), version());
    set_num_threads(before);
}

// The variable is read once, so each value gets a process that has not looked yet.
TEST(NumThreadsChild, DISABLED_IsAsExpected) {
    EXPECT_EQ(get_num_threads(), std::atoi(std::getenv("EXPECTED")));
}

TEST(NumThreads, EnvironmentVariable) {
    const std::string cpus = std::to_string(usable_cpus());
    const std::pair<std::string, std::string> cases[] = {{"7", "7"},
                                                         {"", cpus},
                                                         {"0", cpus},
                                                         {"-2", cpus},
                                                         {"2x", cpus},
                                                         {"many", cpus},
                                                         {"99999999999999999999", cpus}};
    for (const auto& [value, expected] : cases) {
        const auto child = testing::run_test_in_child(
            "NumThreadsChild.DISABLED_IsAsExpected",
            {{"FASTATTN_NUM_THREADS", value}, {"OMP_NUM_THREADS", ""}, {"EXPECTED", expected}});
        if (!child.started) GTEST_SKIP() << "this binary cannot start itself";
        EXPECT_TRUE(child.passed) << value << ": " << child.output;
        const bool complained =
            child.output.find("FASTATTN_NUM_THREADS: expected 1 to 1024, got") != std::string::npos;
        EXPECT_EQ(complained, value != "" && value != "7") << child.output;
    }
}

#if defined(__linux__)
// CPUs that this thread may use, as a list.
std::vector<int> my_cpus() {
    cpu_set_t set;
    std::vector<int> cpus;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(static_cast<unsigned>(cpu), &set)) cpus.push_back(cpu);
    return cpus;
}

// The calling thread alone on one CPU.
void pin_to(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<unsigned>(cpu), &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
}

TEST(ThreadPool, WorkersStayOffTheCallersCpu) {
    const std::vector<int> cpus = my_cpus();
    if (cpus.size() < 2) GTEST_SKIP() << "needs two CPUs";
    EXPECT_TRUE(needs_two_threads());  // starts a worker before anybody is pinned
    std::thread([&] {                  // a caller with an affinity of its own
        std::atomic<int> wrong{0}, by_worker{0};
        for (int round = 0; round < 8; ++round) {
            const int mine = cpus[static_cast<std::size_t>(round) % cpus.size()];
            pin_to(mine);
            ThreadPoolExecutor executor(2);
            auto item = [&](std::int64_t, int slot) {
                const int cpu = current_cpu();
                if (slot == 0 ? cpu != mine : cpu == mine) ++wrong;
                by_worker += slot;
                std::this_thread::sleep_for(1ms);
            };
            executor.for_each(20, item);
        }
        EXPECT_EQ(wrong, 0);
        EXPECT_GT(by_worker, 0);
    })
        .join();
}

TEST(CpuPlacement, KeepsWhatOthersAllow) {
    const std::vector<int> cpus = my_cpus();
    if (cpus.size() < 2) GTEST_SKIP() << "needs two CPUs";
    std::thread([&] {
        CpuPlacement placement;
        placement.leave(cpus[0]);  // not started: nothing happens
        EXPECT_EQ(my_cpus(), cpus);
        placement.start();
        placement.leave(-1);
        EXPECT_EQ(my_cpus(), cpus);
        placement.leave(cpus[0]);
        EXPECT_EQ(my_cpus(), std::vector<int>(cpus.begin() + 1, cpus.end()));
        placement.leave(cpus[1]);  // the first one is free again
        const std::vector<int> now = my_cpus();
        EXPECT_EQ(now.size(), cpus.size() - 1);
        EXPECT_EQ(now.front(), cpus[0]);
        pin_to(cpus[1]);  // by somebody else: the only CPU there is, so it cannot be left
        placement.leave(cpus[0]);
        EXPECT_EQ(my_cpus(), std::vector<int>{cpus[1]});
        placement.leave(cpus[1]);
        EXPECT_EQ(my_cpus(), std::vector<int>{cpus[1]});
    }).join();
}
#endif

// Far from the end of a run it is exactly what this thread computes next; and asking loses no item and
// repeats none.
TEST(ThreadPool, NextItemIsWhatComesNext) {
    constexpr std::int64_t kItems = 1000;
    for (const std::int64_t groups : {1, 2, 8, 1000}) {
        for (const int threads : {1, 2, 3}) {
            const std::int64_t runs = std::min<std::int64_t>(threads, groups),
                               sharing = (threads + runs - 1) / runs;
            const auto may_go_elsewhere = [&](std::int64_t next) {
                for (std::int64_t r = 1; r <= runs; ++r) {
                    const std::int64_t end = r * groups / runs * (kItems / groups);
                    if (next >= end - sharing && next < end) return true;
                }
                return next >= kItems;
            };
            ThreadPoolExecutor executor(threads);
            std::atomic<int> wrong{0}, begun{0};
            std::vector<std::atomic<int>> times(kItems);
            std::vector<std::int64_t> expected(static_cast<std::size_t>(threads), -1);
            auto item = [&](std::int64_t i, int slot) {
                const bool at_the_end = ++begun > kItems - 20;  // where nothing is set aside
                ++times[static_cast<std::size_t>(i)];
                std::int64_t& mine = expected[static_cast<std::size_t>(slot)];
                if (mine >= 0 && mine != i) ++wrong;
                mine = -1;
                if (i % 7 == 0) return;  // not every item asks
                const std::int64_t next = executor.next_item();
                if (next < 0) ++wrong;
                if (threads > 1 && (may_go_elsewhere(next) || at_the_end)) return;
                if ((threads == 1 && next != i + 1) || next != executor.next_item()) ++wrong;
                mine = next;
            };
            executor.for_each(kItems, item, groups);
            EXPECT_EQ(wrong, 0) << threads << " threads, groups " << groups;
            for (const std::atomic<int>& n : times) EXPECT_EQ(n, 1) << threads << " threads";
        }
    }
}

TEST(ThreadPool, ThreadsBeginInDifferentGroups) {
    constexpr std::int64_t kItems = 60;
    for (const std::int64_t groups : {2, 3, 20}) {
        const std::int64_t half = groups / 2 * (kItems / groups);  // where the second run begins
        ThreadPoolExecutor executor(2);
        std::vector<std::int64_t> by_slot[2];
        std::atomic<int> begun{0};
        auto item = [&](std::int64_t i, int slot) {
            auto& mine = by_slot[slot];
            mine.push_back(i);
            if (mine.size() == 1) {  // nobody is done with a run before the other has begun
                ++begun;
                for (int ms = 0; begun < 2 && ms < 20000; ++ms)
                    std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        };
        executor.for_each(kItems, item, groups);
        ASSERT_FALSE(by_slot[0].empty());
        EXPECT_EQ(by_slot[0][0], 0);
        ASSERT_FALSE(by_slot[1].empty());
        EXPECT_EQ(by_slot[1][0], half);
        for (int slot :
             {0, 1}) {  // one after the other up to the end of the run, unless the other thread helps
            const std::int64_t first = slot == 0 ? 0 : half, end = slot == 0 ? half : kItems;
            for (std::size_t i = 1; i < by_slot[slot].size() && by_slot[slot][i] >= first; ++i) {
                if (by_slot[slot][i] >= end || by_slot[slot][i - 1] >= end) break;
                EXPECT_GT(by_slot[slot][i], by_slot[slot][i - 1]) << groups;
            }
        }
    }
}

TEST(ThreadPool, AThreadWithoutItemsTakesThoseOfOthers) {
    constexpr std::int64_t kItems = 40;
    for (const std::int64_t groups : {1, 4, 40}) {
        ThreadPoolExecutor executor(2);
        std::atomic<int> done{0};
        std::atomic<bool> one_waits{false};
        auto item = [&](std::int64_t, int) {
            if (!one_waits.exchange(true)) {  // the first to come: until the other has done all the rest
                while (done < kItems - 1) std::this_thread::yield();
            }
            ++done;
        };
        executor.for_each(kItems, item, groups);
        EXPECT_EQ(done, kItems);
    }
}

TEST(ThreadPool, AStopDropsWhatWasClaimedAhead) {
    std::atomic<bool> stop{false};
    ThreadPoolExecutor executor(
        2, [](void* flag) { return static_cast<std::atomic<bool>*>(flag)->load(); }, &stop);
    std::atomic<int> begun_after{0};
    auto item = [&](std::int64_t i, int) {
        if (executor.stop_requested()) ++begun_after;
        static_cast<void>(executor.next_item());
        if (i == 20) stop = true;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    };
    EXPECT_THROW(executor.for_each(100000, item), Cancelled);
    EXPECT_LE(begun_after, 2);  // one a thread may begin while the other is told
}

class Cgroup : public ::testing::Test {
protected:
    const std::filesystem::path root =
        std::filesystem::temp_directory_path() / ("fastattn_cgroup_" + std::to_string(getpid()));
    void write(const std::string& path, const std::string& text) {
        std::filesystem::create_directories((root / path).parent_path());
        std::ofstream(root / path) << text;
    }
    double quota(const std::string& proc_cgroup) { return cgroup_cpu_quota(proc_cgroup, root.string()); }
    void TearDown() override { std::filesystem::remove_all(root); }
};

TEST_F(Cgroup, Version2TakesTheTightestOnTheWayUp) {
    write("a/b/cpu.max", "max 100000\n");
    EXPECT_EQ(quota("0::/a/b\n"), 0);
    write("a/cpu.max", "150000 100000\n");
    EXPECT_EQ(quota("0::/a/b\n"), 1.5);
    write("a/b/cpu.max", "400000 100000\n");
    EXPECT_EQ(quota("0::/a/b\n"), 1.5);
    write("cpu.max", "100000 100000\n");
    EXPECT_EQ(quota("0::/a/b\n"), 1);
    EXPECT_EQ(quota("0::/\n"), 1);
    EXPECT_EQ(quota("0::/not/here\n"), 1);  // a container that sees its host's path
    EXPECT_EQ(quota("nonsense"), 0);
}

TEST_F(Cgroup, Version1) {
    const std::string proc = "5:memory:/x\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/\n";
    EXPECT_EQ(quota(proc), 0);
    write("cpu,cpuacct/docker/1/cpu.cfs_quota_us", "-1\n");
    write("cpu,cpuacct/docker/1/cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(quota(proc), 0);
    write("cpu,cpuacct/docker/1/cpu.cfs_quota_us", "250000\n");
    EXPECT_EQ(quota(proc), 2.5);
    write("cpu/cpu.cfs_quota_us", "50000\n");
    write("cpu/cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(quota("4:cpu:/docker/2\n"), 0.5);
}

}  // namespace
}  // namespace fastattn
