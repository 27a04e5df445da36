// Kernels on the emulated GPU. One block at a time; its threads are fibers on one thread of the host, each of
// which runs until it has to wait. With FASTATTN_EMULATOR_THREADS they are threads of the host.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_shim.h"
#include "state.h"

#if defined(FASTATTN_EMULATOR_THREADS)
#include <barrier>
#include <mutex>
#include <thread>
#else
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#if defined(FASTATTN_EMULATOR_THREADS)
constinit thread_local fastattn::emulator::Dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
#else
fastattn::emulator::Dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0};
#endif
fastattn::emulator::Dim3 blockDim, gridDim;

namespace fastattn::emulator {
namespace {

bool g_reversed = false;

const char* name_of(WarpFunction function) {
    switch (function) {
        case WarpFunction::sync: return "__syncwarp";
        case WarpFunction::shuffle: return "a shuffle";
        case WarpFunction::any: return "__any_sync";
        case WarpFunction::all: return "__all_sync";
        case WarpFunction::ballot: return "__ballot_sync";
    }
    return "";
}

unsigned lanes_present(unsigned warp, unsigned threads) {
    const unsigned left = threads - warp * 32;
    return left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1u;
}

template <class Body>
void for_each_block(Dim3 grid, const Body& body) {
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) body(Dim3{x, y, z});
        }
    }
}

// What `posted` of all lanes of `mask` means for `lane`.
template <class Posted>
std::uint64_t result_of(WarpFunction function, unsigned mask, unsigned source, const Posted& posted) {
    if (function == WarpFunction::sync) return 0;
    if (function == WarpFunction::shuffle) {
        if (source >= 32 || ((mask >> source) & 1u) == 0) {
            die("a shuffle reads lane %u, which takes no part (mask 0x%08x)", source, mask);
        }
        return posted(source);
    }
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (((mask >> lane) & 1u) != 0 && posted(lane) != 0) ballot |= 1u << lane;
    }
    if (function == WarpFunction::any) return ballot != 0;
    if (function == WarpFunction::all) return ballot == mask;
    return ballot;
}

#if defined(FASTATTN_EMULATOR_THREADS)

// ---- threads ----------------------------------------------------------------------------------------------
// No lock is shared by the threads of a block: it would order accesses that the kernel leaves unordered, and
// hide the race. So divergent barriers hang here; the fibers report them.

struct Warp {
    explicit Warp(unsigned lanes) : barrier(lanes) {}
    std::barrier<> barrier;
    std::uint64_t posted[32] = {};
};

struct Block {
    explicit Block(unsigned count) : threads(count), barrier(count) {
        for (unsigned first = 0; first < count; first += 32) {
            warps.push_back(std::make_unique<Warp>(std::min(32u, count - first)));
        }
    }
    unsigned threads;
    std::barrier<> barrier;
    std::vector<std::unique_ptr<Warp>> warps;
};

Block* g_block = nullptr;

void run_grid(Dim3 grid, unsigned threads, const std::function<void()>& body) {
    const Lock lock(mutex());
    Block block(threads);
    g_block = &block;
    gridDim = grid;
    blockDim = {threads, 1, 1};
    const auto run_thread = [&](unsigned thread) {
        for_each_block(grid, [&](Dim3 index) {
            threadIdx = {thread, 0, 0};
            blockIdx = index;
            body();
            block.barrier.arrive_and_wait();  // the next block has the same __shared__ arrays
        });
    };
    std::vector<std::thread> team;
    team.reserve(threads);
    for (unsigned i = 0; i < threads; ++i) {
        team.emplace_back(run_thread, g_reversed ? threads - 1 - i : i);
    }
    for (std::thread& thread : team) thread.join();
    g_block = nullptr;
}

#else

// ---- fibers -----------------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 256 * 1024;  // red zones make frames larger
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif
constexpr std::size_t kGuardBytes = 4096 * 16;  // a multiple of every usual page size

struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t registers = {};
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#endif
    const void* stack = nullptr;
    std::size_t stack_bytes = 0;
};

enum class Waiting : unsigned char { no, block, warp, condition };

struct Thread {
    Context* fiber = nullptr;
    bool finished = false;
    Waiting waiting = Waiting::no;
    WarpFunction function = WarpFunction::sync;
    unsigned mask = 0, source = 0;
    std::uint64_t posted = 0, result = 0;
    const std::function<bool()>* condition = nullptr;
};

// The block that runs; under the lock of the GPU.
struct Scheduler {
    const std::function<void()>* body = nullptr;
    unsigned count = 0, started = 0, finished = 0, at_barrier = 0, conditions = 0;
    std::vector<Thread> threads;
    std::vector<unsigned> warp_waiting;  // of each warp, the lanes that wait in a warp function
    // Threads that may go on, first in first out: a ring of `count`, as each is there once at most.
    std::vector<unsigned> ring;
    unsigned first_ready = 0, ready = 0;
    std::vector<Context*> idle;  // fibers without a thread; they stay for later launches
    Context host;
    Context* current = &host;
    Context* target = nullptr;  // of the switch under way: a new fiber learns from it who it is
};

void make_ready(Scheduler& s, unsigned thread) {
    s.threads[thread].waiting = Waiting::no;
    const unsigned at = s.first_ready + s.ready++;
    s.ring[at < s.count ? at : at - s.count] = thread;
}

Scheduler& scheduler() {
    static Scheduler* const the = new Scheduler;
    return *the;
}

#if defined(__x86_64__)
// Saves what the ABI wants preserved, and the stack pointer to *save; goes on where `load` was saved.
// swapcontext() would do but for its two system calls.
extern "C" __attribute__((visibility("hidden"))) void fastattn_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl fastattn_emulator_switch
.hidden fastattn_emulator_switch
.type fastattn_emulator_switch, @function
fastattn_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size fastattn_emulator_switch, .-fastattn_emulator_switch
)");
#endif

// After every switch, first thing on the stack that goes on.
void arrived() {
    Scheduler& s = scheduler();
#if defined(__SANITIZE_ADDRESS__)
    const void* from = nullptr;
    std::size_t from_bytes = 0;
    __sanitizer_finish_switch_fiber(s.target->fake_stack, &from, &from_bytes);
    if (s.current == &s.host) {  // the sanitizer knows the host's stack, and tells us here
        s.host.stack = from;
        s.host.stack_bytes = from_bytes;
    }
#endif
    s.current = s.target;
}

void switch_to(Context& target) {
    Context& self = *scheduler().current;
    if (&self == &target) return;
    scheduler().target = &target;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&self.fake_stack, target.stack, target.stack_bytes);
#endif
#if defined(__x86_64__)
    fastattn_emulator_switch(&self.stack_pointer, target.stack_pointer);
#else
    swapcontext(&self.registers, &target.registers);
#endif
    arrived();
}

[[noreturn]] void die_of_deadlock() {
    const Scheduler& s = scheduler();
    // Runs of threads in the same state, as far as they help.
    const auto what = [&](unsigned i) -> std::string {
        const Thread& thread = s.threads[i];
        if (thread.finished) return "returned";
        if (thread.waiting == Waiting::block) return "in __syncthreads";
        if (thread.waiting == Waiting::condition) return "waiting for a barrier in shared memory";
        char text[64];
        std::snprintf(text, sizeof text, "in %s, mask 0x%08x", name_of(thread.function), thread.mask);
        return text;
    };
    std::string list;
    for (unsigned i = 0, runs = 0; i < s.count; ++runs) {
        unsigned end = i + 1;
        while (end < s.count && what(end) == what(i)) ++end;
        if (runs < 8)
            list += "\n  threads " + std::to_string(i) + ".." + std::to_string(end - 1) + ": " + what(i);
        if (runs == 8) list += "\n  ...";
        i = end;
    }
    die("deadlock: a barrier that not all threads reach, block (%u, %u, %u)%s", blockIdx.x, blockIdx.y,
        blockIdx.z, list.c_str());
}

[[noreturn]] void fiber_main() noexcept;

Context* new_fiber() {
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) die("no memory for the stack of a thread");
    // An overflow must not reach a neighbour's stack.
    if (mprotect(memory, kGuardBytes, PROT_NONE) != 0) die("no guard page for the stack of a thread");
    char* const stack = static_cast<char*>(memory) + kGuardBytes;
    auto* const fiber = new Context;  // kept for ever, as its stack
    fiber->stack = stack;
    fiber->stack_bytes = kStackBytes;
#if defined(__x86_64__)
    // As if fiber_main had been about to be returned to: six registers, its address, and a null return
    // address that also aligns the stack as a call does.
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber->stack_pointer = top;
#else
    if (getcontext(&fiber->registers) != 0) die("getcontext failed");
    fiber->registers.uc_stack.ss_sp = stack;
    fiber->registers.uc_stack.ss_size = kStackBytes;
    fiber->registers.uc_link = nullptr;
    makecontext(&fiber->registers, fiber_main, 0);
#endif
    return fiber;
}

// Who runs when the current fiber cannot go on.
Context& next_context() {
    Scheduler& s = scheduler();
    if (s.ready > 0) {
        const unsigned thread = s.ring[s.first_ready];
        if (++s.first_ready == s.count) s.first_ready = 0;
        --s.ready;
        return *s.threads[thread].fiber;
    }
    if (s.started < s.count) {
        if (s.idle.empty()) s.idle.push_back(new_fiber());
        Context* const fiber = s.idle.back();
        s.idle.pop_back();
        return *fiber;
    }
    if (s.conditions > 0) {
        for (Thread& thread : s.threads) {
            if (thread.waiting != Waiting::condition || !(*thread.condition)()) continue;
            thread.waiting = Waiting::no;
            --s.conditions;
            return *thread.fiber;
        }
    }
    if (s.finished < s.count) die_of_deadlock();
    return s.host;
}

// The new fiber's number is not handed over: it takes the next thread that has not begun.
void fiber_main() noexcept {
    Scheduler& s = scheduler();
    arrived();
    Context& self = *s.current;
    for (;;) {
        // Threads that never wait all run here, one after another, without a switch.
        while (s.started < s.count && s.ready == 0) {
            const unsigned number = s.started++;
            const unsigned index = g_reversed ? s.count - 1 - number : number;
            Thread& thread = s.threads[index];
            thread.fiber = &self;
            threadIdx.x = index;
            (*s.body)();
            thread.finished = true;
            ++s.finished;
        }
        s.idle.push_back(&self);
        switch_to(next_context());
    }
}

void run_grid(Dim3 grid, unsigned threads, const std::function<void()>& body) {
    const Lock lock(mutex());
    Scheduler& s = scheduler();
    gridDim = grid;
    blockDim = {threads, 1, 1};
    s.body = &body;
    s.count = threads;
    for_each_block(grid, [&](Dim3 index) {
        blockIdx = index;
        s.threads.assign(threads, Thread{});
        s.warp_waiting.assign((threads + 31) / 32, 0);
        s.ring.resize(threads);
        s.started = s.finished = s.at_barrier = s.conditions = s.first_ready = s.ready = 0;
        switch_to(next_context());
    });
}

// Waits until another thread has set `waiting` back.
void wait_for_others(unsigned thread) {
    switch_to(next_context());
    threadIdx.x = thread;
}

#endif

}  // namespace

void set_threads_reversed_locked(bool reversed) { g_reversed = reversed; }

unsigned warp_lane() { return threadIdx.x % 32; }

#if defined(FASTATTN_EMULATOR_THREADS)

namespace {
std::mutex& condition_mutex() {
    static std::mutex the;
    return the;
}
}  // namespace

void wait_until(const std::function<bool()>& ready) {
    for (;; std::this_thread::yield()) {
        const std::lock_guard lock(condition_mutex());
        if (ready()) return;
    }
}

void atomically(const std::function<void()>& change) {
    const std::lock_guard lock(condition_mutex());
    change();
}

std::uint64_t warp_exchange(WarpFunction function, unsigned mask, std::uint64_t value, unsigned source) {
    const unsigned lane = threadIdx.x % 32, warp_index = threadIdx.x / 32;
    const unsigned present = lanes_present(warp_index, g_block->threads);
    if ((mask & present) != present)
        die("threads mode wants full masks, %s has 0x%08x", name_of(function), mask);
    Warp& warp = *g_block->warps[warp_index];
    warp.posted[lane] = value;
    warp.barrier.arrive_and_wait();
    const std::uint64_t result =
        result_of(function, present, source, [&](unsigned other) { return warp.posted[other]; });
    warp.barrier.arrive_and_wait();
    return result;
}

#else

void wait_until(const std::function<bool()>& ready) {
    if (ready()) return;
    Scheduler& s = scheduler();
    const unsigned index = threadIdx.x;
    s.threads[index].waiting = Waiting::condition;
    s.threads[index].condition = &ready;
    ++s.conditions;
    wait_for_others(index);
}

void atomically(const std::function<void()>& change) { change(); }

std::uint64_t warp_exchange(WarpFunction function, unsigned mask, std::uint64_t value, unsigned source) {
    Scheduler& s = scheduler();
    const unsigned index = threadIdx.x, lane = index % 32, warp = index / 32;
    mask &= lanes_present(warp, s.count);
    if (((mask >> lane) & 1u) == 0)
        die("%s: lane %u is not in its own mask 0x%08x", name_of(function), lane, mask);
    Thread& self = s.threads[index];
    self.waiting = Waiting::warp;
    self.function = function;
    self.mask = mask;
    self.source = source;
    self.posted = value;
    unsigned& waiting = s.warp_waiting[warp];
    waiting |= 1u << lane;
    if ((waiting & mask) != mask) {
        wait_for_others(index);
        return s.threads[index].result;
    }
    // The last to arrive does the exchange for all, so that no second barrier is needed.
    Thread* const lanes = &s.threads[warp * 32];
    const auto posted = [lanes](unsigned other) { return lanes[other].posted; };
    for (unsigned other = 0; other < 32; ++other) {
        if (((mask >> other) & 1u) == 0) continue;
        Thread& thread = lanes[other];
        if (thread.mask != mask || thread.function != function) {
            die("lanes of a warp diverge: lane %u in %s with mask 0x%08x, lane %u in %s with mask 0x%08x",
                lane, name_of(function), mask, other, name_of(thread.function), thread.mask);
        }
        thread.result = result_of(function, mask, thread.source, posted);
        if (other != lane) make_ready(s, warp * 32 + other);
    }
    waiting &= ~mask;
    self.waiting = Waiting::no;
    return self.result;
}

#endif

void launch(Dim3 grid, unsigned block_threads, void* stream, std::function<void()> body) {
    const Lock lock(mutex());
    if (const int code = injected("launch")) return set_last_error(code);
    const bool valid = grid.x >= 1 && grid.x <= 0x7FFFFFFFu && grid.y >= 1 && grid.y <= 65535 &&
                       grid.z >= 1 && grid.z <= 65535 && block_threads >= 1 && block_threads <= 1024;
    if (!valid) return set_last_error(kInvalidConfiguration);
    if (!on_current_device(stream)) return set_last_error(kInvalidHandle);
    enqueue(stream, [grid, block_threads, body = std::move(body)] { run_grid(grid, block_threads, body); });
}

}  // namespace fastattn::emulator

void __syncthreads() {
    using namespace fastattn::emulator;
#if defined(FASTATTN_EMULATOR_THREADS)
    g_block->barrier.arrive_and_wait();
#else
    Scheduler& s = scheduler();
    const unsigned index = threadIdx.x;
    if (++s.at_barrier < s.count) {
        s.threads[index].waiting = Waiting::block;
        return wait_for_others(index);
    }
    s.at_barrier = 0;
    for (unsigned other = 0; other < s.count; ++other) {
        if (other != index) make_ready(s, other);
    }
#endif
}
