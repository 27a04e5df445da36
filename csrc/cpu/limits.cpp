// Peak measurements: every thread repeats short windows of work that start together; the best window
// counts, since other processes can only make one slower.
#include <fastattn/limits.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include <fastattn/attention.h>

#include "core/kernel.h"
#include "cpu/isa_kernels.h"
#include "threads/cpu_count.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/mman.h>
#endif

namespace fastattn {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr double kWindow = 0.004;  // seconds: far above the cost of starting together
constexpr int kMaxThreads = 4096;

void check(int threads, double seconds) {
    if (threads < 1 || threads > kMaxThreads)
        throw ValueError("threads: expected 1 to " + std::to_string(kMaxThreads) + ", got " +
                         std::to_string(threads));
    if (!(seconds > 0.0) || seconds > 3600.0)
        throw ValueError("seconds: expected a number in (0, 3600], got " + std::to_string(seconds));
}

// One CPU for each thread of the measurement: a scheduler can leave fresh threads that wait for each other
// together on one CPU for half a second, longer than we measure.
void pin_to_cpu([[maybe_unused]] std::size_t thread) noexcept {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    const int usable = CPU_COUNT(&allowed);
    if (usable <= 0) return;
    int skip = static_cast<int>(thread % static_cast<std::size_t>(usable));
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &allowed) && skip-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            sched_setaffinity(0, sizeof one, &one);  // only a hint for us: failing, we measure unpinned
            return;
        }
#endif
}

// Runs work(thread, repeats) on all threads at once, in windows of about kWindow, for `seconds`, and
// returns the best rate of one window in units per second; work returns the units it did. Only threads of
// its own compute: the caller's affinity stays as it is.
template <class Work>
double best_rate(int threads, double seconds, Work work) {
    const auto count = static_cast<std::size_t>(threads);
    struct alignas(64) Window {
        double units = 0.0;
        Clock::time_point begin, end;
    };
    std::vector<Window> window(count);
    std::int64_t repeats = 1;
    double best = 0.0;
    std::atomic<int> gate{0};  // 1: go, -1: a thread could not be started
    bool done = false, warm = false;  // the first window touches memory and wakes cores: not counted
    const Clock::time_point start = Clock::now();

    // Runs on one thread while the others wait: judges the window and plans the next one.
    const auto judge = [&]() noexcept {
        Clock::time_point begin = window[0].begin, end = window[0].end;
        double units = 0.0;
        for (const Window& w : window) {
            begin = std::min(begin, w.begin);
            end = std::max(end, w.end);
            units += w.units;
        }
        const double elapsed = std::chrono::duration<double>(end - begin).count();
        if (warm && elapsed >= 0.5 * kWindow) best = std::max(best, units / elapsed);
        if (elapsed < 0.75 * kWindow)
            repeats =
                std::max(repeats + 1, static_cast<std::int64_t>(static_cast<double>(repeats) *
                                                                std::min(8.0, kWindow / (elapsed + 1e-9))));
        warm = true;
        done = best > 0.0 && seconds_since(start) >= seconds;
    };
    std::barrier sync(threads, judge);
    std::barrier together(threads);
    const auto body = [&](std::size_t t) {
        while (!done) {
            together.arrive_and_wait();
            window[t].begin = Clock::now();
            window[t].units = work(t, repeats);
            window[t].end = Clock::now();
            sync.arrive_and_wait();
        }
    };

    std::vector<std::jthread> workers;
    try {
        for (std::size_t t = 0; t < count; ++t)
            workers.emplace_back([&, t] {
                pin_to_cpu(t);
                gate.wait(0);
                if (gate.load() > 0) body(t);
            });
    } catch (...) {
        gate = -1;
        gate.notify_all();
        throw;
    }
    gate = 1;
    gate.notify_all();
    workers.clear();  // joins
    return best;
}

// Eight independent 16-byte chains, which stay in the registers of every ISA: the loads are the limit, and
// at 16 bytes each they saturate every level from the shared cache on. Not inlined, so that every repeat
// reads again and the chains keep their registers.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
std::uint64_t read_all(const std::uint64_t* p, std::size_t count) {
    std::uint64_t sum[16] = {};
    for (std::size_t i = 0; i < count; i += 16)
        for (std::size_t j = 0; j < 16; ++j) sum[j] ^= p[i + j];
    std::uint64_t all = 0;
    for (const std::uint64_t s : sum) all ^= s;
    return all;
}

constexpr std::size_t kHugePage = std::size_t{2} << 20;

struct FreeAligned {
    void operator()(std::uint64_t* p) const { ::operator delete(p, std::align_val_t{kHugePage}); }
};
using Part = std::unique_ptr<std::uint64_t, FreeAligned>;

Part make_part(std::size_t bytes) {
    void* p = ::operator new(bytes, std::align_val_t{kHugePage}, std::nothrow);
    if (p == nullptr) throw OutOfMemory("measure_read_bandwidth", bytes);
#if defined(__linux__)
    madvise(p, bytes, MADV_HUGEPAGE);  // only advice: refused, the measurement is of small pages
#endif
    return Part(static_cast<std::uint64_t*>(p));
}

}  // namespace

double measure_fma_peak(std::string_view kernel, DType dtype, int threads, double seconds) {
    check(threads, seconds);
    threads = std::min(threads, usable_cpus());  // more threads than CPUs add nothing to a limit
    if (!is_float(dtype))
        throw ValueError(std::string("dtype: expected a float type, got ") + dtype_name(dtype));
    const char* unusable = nullptr;
    bool known = false;
    for (const Kernel& k : cpu_kernels())
        if (kernel == k.name) {
            known = true;
            unusable = k.unavailable();
        }
    if (!known) throw ValueError("kernel: no CPU kernel is named '" + std::string(kernel) + "'");
    if (unusable != nullptr) throw UnsupportedError("kernel " + std::string(kernel) + ": " + unusable);

    // cpu-reference is plain loops, as scalar code is.
    const cpu::IsaKernels* isa =
        cpu::find_isa_kernels(kernel == "cpu-reference" ? std::string_view("cpu-scalar") : kernel);
    if (isa == nullptr) throw UnsupportedError("kernel " + std::string(kernel) + ": has no peak measurement");
    auto burst = isa->fma_burst_f32;
    if (dtype == DType::f64) burst = isa->fma_burst_f64;
    if (dtype == DType::bf16 && isa->fma_burst_bf16 != nullptr) burst = isa->fma_burst_bf16;
    if (burst == nullptr)
        throw UnsupportedError("kernel " + std::string(kernel) + ": has no arithmetic in " +
                               dtype_name(dtype));
    return best_rate(threads, seconds,
                     [burst](std::size_t, std::int64_t repeats) { return burst(repeats * 1000); });
}

double measure_read_bandwidth(std::size_t bytes, int threads, double seconds) {
    check(threads, seconds);
    threads = std::min(threads, usable_cpus());  // more threads than CPUs add nothing to a limit
    const std::size_t part = bytes / static_cast<std::size_t>(threads) / 128 * 128;
    if (part == 0)
        throw ValueError("bytes: expected at least 128 for each thread, got " + std::to_string(bytes));
    std::vector<Part> parts;
    for (int t = 0; t < threads; ++t) parts.push_back(make_part(part));
    std::vector<std::uint64_t> sinks(static_cast<std::size_t>(threads));
    std::vector<char> touched(static_cast<std::size_t>(threads), 0);
    return best_rate(threads, seconds, [&](std::size_t t, std::int64_t repeats) {
        std::uint64_t* data = parts[t].get();
        if (!touched[t]) {  // first touch on the thread that reads, for its memory node
            std::memset(data, 1, part);
            touched[t] = 1;
        }
        std::uint64_t sum = 0;
        for (std::int64_t r = 0; r < repeats; ++r) {
            sum += read_all(data, part / sizeof(std::uint64_t));
            std::atomic_signal_fence(std::memory_order_seq_cst);  // every repeat reads again
        }
        sinks[t] += sum;
        return static_cast<double>(part) * static_cast<double>(repeats);
    });
}

}  // namespace fastattn
