#include "threads/thread_pool.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include <fastattn/attention.h>

#include "threads/cpu_count.h"
#include "threads/cpu_placement.h"

#if defined(_WIN32)
#define FASTATTN_EXPORT __declspec(dllexport)
#else
#define FASTATTN_EXPORT __attribute__((visibility("default")))
#include <pthread.h>
#include <csignal>
#include <ctime>
#endif

namespace fastattn {
namespace {

using Index = std::int64_t;

constexpr Index kPollMilliseconds = 20;
constexpr int kCallsPerClock =
    8;  // where calls are less than that apart, as the clock costs a percent of a tile

// Read often, so the cheap clock where there is one: good to 4 ms, a few ns a call.
Index now_ms() noexcept {
#if defined(CLOCK_MONOTONIC_COARSE)
    timespec t{};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    return Index{t.tv_sec} * 1000 + t.tv_nsec / 1000000;
#else
    using namespace std::chrono;
    return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
#endif
}

// Signals are for the application's threads; faults stay deliverable where they happen.
class BlockSignals {
public:
#if defined(_WIN32)
    BlockSignals() noexcept {}
#else
    BlockSignals() noexcept {
        sigset_t all;
        sigfillset(&all);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, fault);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~BlockSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
#endif
};

// The items of a job, in runs of neighbouring groups. A thread takes items from the run of its slot and, when
// that is at its end, from the one with the most left.
class ItemRuns {
public:
    ItemRuns(Index items, Index groups, int threads) noexcept : items_(items), threads_(threads) {
        groups = std::clamp<Index>(groups, 1, items);
        count_ = static_cast<int>(std::min<Index>(std::min(threads, kMostRuns), groups));
        threads_per_run_ = (threads + count_ - 1) / count_;
        const Index group = items / groups;
        for (Index i = 0, begin = 0; i < count_; ++i) {
            Run& run = runs_[static_cast<std::size_t>(i)];
            run.next.store(begin, std::memory_order_relaxed);
            run.end = begin = i + 1 == count_ ? items : (i + 1) * groups / count_ * group;
        }
    }

    // -1: there is none left.
    Index claim(int slot) noexcept {
        Run* run = &own(slot);
        while (true) {
            const Index item = run->next.fetch_add(1, std::memory_order_relaxed);
            if (item < run->end) return item;
            Index most = 0;
            for (int i = 0; i < count_; ++i) {
                const Index left = runs_[static_cast<std::size_t>(i)].left();
                if (left <= most) continue;
                most = left;
                run = &runs_[static_cast<std::size_t>(i)];
            }
            if (most == 0) return -1;
        }
    }

    // What claim() would give to a thread that goes on in its own run. Set aside for it, unless it is one of
    // the last, which are for whoever is free first.
    Index look_ahead(int slot, Index& claimed) noexcept {
        Run& run = own(slot);
        const Index left = run.left();
        if (left == 0) return items_;
        if (left <= threads_per_run_ || all_left() <= threads_) return run.end - left;
        claimed = claim(slot);
        return claimed < 0 ? items_ : claimed;
    }

    Index all_left() const noexcept {
        Index left = 0;
        for (int i = 0; i < count_; ++i) left += runs_[static_cast<std::size_t>(i)].left();
        return left;
    }

    void drop() noexcept {
        for (int i = 0; i < count_; ++i) {
            Run& run = runs_[static_cast<std::size_t>(i)];
            run.next.store(run.end, std::memory_order_relaxed);
        }
    }

private:
    static constexpr int kMostRuns = 64;  // an executor has more threads rarely; they share runs

    // A cache line each: threads count in their own.
    struct alignas(64) Run {
        std::atomic<Index> next;
        Index end;
        Index left() const noexcept {
            const Index n = next.load(std::memory_order_relaxed);
            return n < end ? end - n : 0;
        }
    };

    Run& own(int slot) noexcept { return runs_[static_cast<std::size_t>(slot % count_)]; }

    const Index items_;
    const int threads_;
    int count_, threads_per_run_;
    std::array<Run, kMostRuns> runs_;
};

// Which item this thread is in: a parallel_for from inside an item runs inline, in the item's slot.
struct CurrentItem {
    const Executor* executor = nullptr;
    int slot = 0;
    Index item = 0;
    ItemRuns* runs = nullptr;  // of a job; inline: next is the one after `item`
    Index claimed = -1;        // ahead, by next_item()
};
thread_local CurrentItem current_item;

struct RestoreCurrent {
    const CurrentItem outer = current_item;
    ~RestoreCurrent() { current_item = outer; }
};

// Counts forks on the child's side, to notice one that a poll function made within a call.
std::atomic<unsigned> fork_generation{0};

}  // namespace

// One parallel_for that uses the pool; lives on the caller's stack.
struct ThreadPoolExecutor::Job {
    ThreadPoolExecutor& executor;
    const ItemFn fn;
    void* const context;
    const int max_helpers;
    ItemRuns runs;
    const int caller_cpu = current_cpu();
    const unsigned generation = fork_generation.load(std::memory_order_relaxed);
    std::fenv_t float_environment{};  // the caller's: an item's result may not depend on its thread

    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // written by whoever set failed

    // Under the pool's mutex.
    int helpers = 0;  // slots handed out to workers
    int active = 0;  // workers inside
    std::condition_variable all_left{};
    Job* following = nullptr;

    bool forked_away() const noexcept {
        return generation != fork_generation.load(std::memory_order_relaxed);
    }
};

class ThreadPool {
public:
    using Job = ThreadPoolExecutor::Job;

    static ThreadPool& get() {
        ThreadPool* pool = instance.load(std::memory_order_acquire);
        if (pool != nullptr) return *pool;
        // No lock here: a fork could find it held by a thread that the child does not have.
        auto* fresh = new ThreadPool;
        if (instance.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;
        return *pool;
    }

    // The parent's pool is left alone, as its mutex may be held: memory for a pool per fork.
    static void abandon() noexcept {
        instance.store(nullptr, std::memory_order_relaxed);
        fork_generation.fetch_add(1, std::memory_order_relaxed);
    }

    void submit(Job& job) {
        const std::lock_guard lock(mutex_);
        start_workers(job.max_helpers);
        job.following = first_;
        first_ = &job;
        for (int n = 0; n < job.max_helpers && idle_ != nullptr; ++n) {
            Worker& worker = *idle_;
            idle_ = worker.next_idle;
            worker.idle = false;
            worker.placement.leave(job.caller_cpu);
            worker.wake.notify_one();
        }
    }

    // The caller has no more items to take: waits for those that workers have. False when this process
    // turned out to be a child, which has no such workers.
    bool finish(Job& job) {
        if (job.forked_away()) return false;
        std::unique_lock lock(mutex_);
        unlink(job);
        while (job.active > 0) {
            if (job.executor.poll_ == nullptr) {
                job.all_left.wait(lock);
                continue;
            }
            job.all_left.wait_for(lock, std::chrono::milliseconds(kPollMilliseconds));
            if (job.active == 0) break;
            lock.unlock();
            job.executor.calls_until_clock_ = 0;
            if (job.executor.stop_requested()) job.runs.drop();
            if (job.forked_away()) return false;
            lock.lock();
        }
        return true;
    }

private:
    // One thread of the pool, on its own stack.
    struct Worker {
        CpuPlacement placement{};
        std::condition_variable wake{};
        bool idle = false;
        Worker* next_idle = nullptr;
    };

    void start_workers(int wanted) {
        if (workers_ >= wanted) return;
        const BlockSignals block;
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {  // no more threads to be had: go on with those there are
        }
    }

    void unlink(Job& job) noexcept {
        Job** link = &first_;
        while (*link != &job) link = &(*link)->following;
        *link = job.following;
    }

    // The job with the fewest workers of those that have items left; called under the mutex.
    Job* find_job() const noexcept {
        Job* chosen = nullptr;
        for (Job* job = first_; job != nullptr; job = job->following) {
            if (job->helpers == job->max_helpers || job->runs.all_left() == 0) continue;
            if (chosen == nullptr || job->active < chosen->active) chosen = job;
        }
        return chosen;
    }

    void work() {
        Worker me;
        std::unique_lock lock(mutex_);
        me.placement.start();
        while (true) {
            Job* const job = find_job();
            if (job == nullptr) {
                // The last to fall asleep is the first to be woken: its caches and its CPU are the warmest.
                me.idle = true;
                me.next_idle = idle_;
                idle_ = &me;
                me.wake.wait(lock, [&] { return !me.idle; });
                continue;
            }
            const int slot = ++job->helpers;
            ++job->active;
            me.placement.leave(job->caller_cpu);  // it may not be the one that woke this worker
            lock.unlock();
            std::fesetenv(&job->float_environment);
            job->executor.run_items(*job, slot);
            lock.lock();
            // Under the lock: once the caller sees 0 the job is gone.
            if (--job->active == 0) job->all_left.notify_one();
        }
    }

    static std::atomic<ThreadPool*> instance;

    std::mutex mutex_;
    Job* first_ = nullptr;
    Worker* idle_ = nullptr;
    int workers_ = 0;
};

std::atomic<ThreadPool*> ThreadPool::instance{nullptr};

namespace {
#if !defined(_WIN32)
// At load time, so that no fork can come between the first pool and this.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, &ThreadPool::abandon);
#endif
}  // namespace

ThreadPoolExecutor::ThreadPoolExecutor(int threads, Poll poll, void* poll_context) noexcept
    : threads_(std::clamp(threads, 1, kMaxThreads)),
      poll_(poll),
      poll_context_(poll_context),
      caller_(std::this_thread::get_id()) {
    if (poll_ != nullptr) next_poll_ms_ = now_ms() + kPollMilliseconds;
}

void ThreadPoolExecutor::parallel_for(Index items, ItemFn fn, void* context, Index groups) {
    if (stop_.load(std::memory_order_relaxed)) throw Cancelled();
    const CurrentItem outer = current_item;
    if (items <= 1 || threads_ == 1 || outer.executor != nullptr)
        return run_inline(items, fn, context, outer.executor == this ? outer.slot : 0);

    const auto helpers = static_cast<int>(std::min<Index>(threads_, items) - 1);
    Job job{.executor = *this,
            .fn = fn,
            .context = context,
            .max_helpers = helpers,
            .runs = ItemRuns(items, groups, helpers + 1)};
    std::fegetenv(&job.float_environment);
    ThreadPool& pool = ThreadPool::get();
    pool.submit(job);
    run_items(job, 0);
    if (!pool.finish(job)) {
        stop_.store(true, std::memory_order_relaxed);
        throw Error("fastattn: the process was forked from within a call, which cannot go on in the child");
    }
    if (job.failed.load(std::memory_order_acquire)) std::rethrow_exception(job.error);
    if (stop_.load(std::memory_order_relaxed)) throw Cancelled();
}

void ThreadPoolExecutor::run_inline(Index items, ItemFn fn, void* context, int slot) {
    const RestoreCurrent restore;
    current_item.runs = nullptr;
    for (Index item = 0; item < items; ++item) {
        current_item.item = item;
        fn(context, item, slot);
        if (stop_requested()) throw Cancelled();
    }
}

void ThreadPoolExecutor::run_items(Job& job, int slot) noexcept {
    const RestoreCurrent restore;
    current_item = {this, slot, 0, &job.runs, -1};
    while (true) {
        const Index item = next_of(job);
        if (item < 0) return;
        try {
            job.fn(job.context, item, slot);
        } catch (...) {
            if (!job.failed.exchange(true, std::memory_order_acq_rel)) job.error = std::current_exception();
            stop_.store(true, std::memory_order_relaxed);
        }
        if (stop_requested() || job.forked_away()) job.runs.drop();
    }
}

// The item that next_item() has claimed, unless the rest was dropped since, or a new one; -1: none left.
Index ThreadPoolExecutor::next_of(Job& job) noexcept {
    const Index claimed = std::exchange(current_item.claimed, -1);
    if (claimed < 0) return job.runs.claim(current_item.slot);
    return stop_.load(std::memory_order_relaxed) || job.forked_away() ? -1 : claimed;
}

// Claims it, so that what is prefetched is what this thread computes: of two threads that look at the same
// counter, one would be wrong.
Index ThreadPoolExecutor::next_item() noexcept {
    CurrentItem& current = current_item;
    if (current.runs == nullptr) return current.item + 1;
    if (current.claimed >= 0) return current.claimed;
    return current.runs->look_ahead(current.slot, current.claimed);
}

bool ThreadPoolExecutor::stop_requested() noexcept {
    if (poll_ != nullptr && !stop_.load(std::memory_order_relaxed) && std::this_thread::get_id() == caller_)
        poll_if_due();
    return stop_.load(std::memory_order_relaxed);
}

void ThreadPoolExecutor::poll_if_due() noexcept {
    if (--calls_until_clock_ > 0) return;
    const Index now = now_ms();
    calls_until_clock_ = now == last_clock_ms_ ? kCallsPerClock : 1;
    last_clock_ms_ = now;
    if (now < next_poll_ms_) return;
    if (poll_(poll_context_)) stop_.store(true, std::memory_order_relaxed);
    next_poll_ms_ = now_ms() + kPollMilliseconds;
}

// ---- the number of threads ------------------------------------------------------------------------
namespace {

std::atomic<int> thread_count{0};  // 0: not asked for yet

// OMP_NUM_THREADS: a list of numbers above 0, one for each level of nested parallelism; the first is ours. 0
// where it is not set or, as OpenMP takes it, not such a list.
int openmp_thread_count() noexcept {
    const char* text = std::getenv("OMP_NUM_THREADS");
    if (text == nullptr) return 0;
    long first = 0;
    while (true) {
        char* end = nullptr;
        errno = 0;
        const long value = std::strtol(text, &end, 10);
        if (errno != 0 || end == text || value < 1) return 0;
        if (first == 0) first = value;
        while (std::isspace(static_cast<unsigned char>(*end)) != 0) ++end;
        if (*end == '\0') return static_cast<int>(std::min<long>(first, kMaxThreads));
        if (*end != ',') return 0;
        text = end + 1;
    }
}

int default_thread_count() noexcept {
    const char* text = std::getenv("FASTATTN_NUM_THREADS");
    if (text != nullptr && *text != '\0') {
        char* end = nullptr;
        errno = 0;
        const long value = std::strtol(text, &end, 10);
        if (errno == 0 && *end == '\0' && value >= 1 && value <= kMaxThreads) return static_cast<int>(value);
        std::fprintf(stderr, "fastattn: FASTATTN_NUM_THREADS: expected 1 to %d, got \"%s\"; ignored\n",
                     kMaxThreads, text);
    }
    const int openmp = openmp_thread_count();
    return openmp > 0 ? openmp : std::min(usable_cpus(), kMaxThreads);
}

}  // namespace

int get_num_threads() noexcept {
    const int count = thread_count.load(std::memory_order_relaxed);
    if (count > 0) return count;
    // Two first callers may both look; a number that was set meanwhile stays.
    int none = 0;
    const int fresh = default_thread_count();
    return thread_count.compare_exchange_strong(none, fresh, std::memory_order_relaxed) ? fresh : none;
}

void set_num_threads(int n) {
    if (n < 1 || n > kMaxThreads)
        throw ValueError("n: expected 1 to " + std::to_string(kMaxThreads) + " threads, got " +
                         std::to_string(n));
    thread_count.store(n, std::memory_order_relaxed);
}

}  // namespace fastattn

// For threadpoolctl, which finds these by name in the loaded library.
extern "C" {
FASTATTN_EXPORT int fastattn_get_num_threads(void) { return fastattn::get_num_threads(); }
FASTATTN_EXPORT void fastattn_set_num_threads(int n) {
    fastattn::set_num_threads(std::clamp(n, 1, fastattn::kMaxThreads));
}
FASTATTN_EXPORT const char* fastattn_version(void) { return fastattn::version(); }
}
