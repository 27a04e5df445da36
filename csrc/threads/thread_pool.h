// The process's own thread pool. Workers are started when first needed, sleep on a condition variable
// while idle, serve several concurrent callers, and are never joined: the process may exit at any time.
// After fork() the child starts with an empty pool.
//
// Every call has its own ThreadPoolExecutor on its stack. The caller takes part as slot 0 and waits for
// items that workers have taken, not for workers: one that wakes too late is not waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "threads/executor.h"

namespace fastattn {

class ThreadPoolExecutor final : public Executor {
public:
    using Poll = bool (*)(void*);

    // poll, when given, is called on the constructing thread about every 20 ms while an item that asks
    // stop_requested() runs or while that thread waits; true stops the call. It must not throw.
    explicit ThreadPoolExecutor(int threads, Poll poll = nullptr, void* poll_context = nullptr) noexcept;
    ThreadPoolExecutor(const ThreadPoolExecutor&) = delete;
    ThreadPoolExecutor& operator=(const ThreadPoolExecutor&) = delete;

    int threads() const noexcept override { return threads_; }
    void parallel_for(std::int64_t items, ItemFn fn, void* context, std::int64_t groups) override;
    bool stop_requested() noexcept override;
    std::int64_t next_item() noexcept override;

private:
    struct Job;
    friend class ThreadPool;

    void run_inline(std::int64_t items, ItemFn fn, void* context, int slot);
    void run_items(Job& job, int slot) noexcept;
    std::int64_t next_of(Job& job) noexcept;
    void poll_if_due() noexcept;

    const int threads_;
    std::atomic<bool> stop_{false};
    const Poll poll_;
    void* const poll_context_;
    const std::thread::id caller_;
    std::int64_t next_poll_ms_ = 0, last_clock_ms_ = 0;
    int calls_until_clock_ = 0;  // of stop_requested() on the calling thread
};

// Slots, and so threads, that one call can have.
inline constexpr int kMaxThreads = 1024;

}  // namespace fastattn
