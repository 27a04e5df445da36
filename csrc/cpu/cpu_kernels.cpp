// The table of the CPU's kernels: kernels.inc joined with what this build holds of it.
#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "core/entry_view.h"
#include "core/kernel.h"
#include "core/padding.h"
#include "cpu/backward/make_schedule.h"
#include "cpu/cpu_features.h"
#include "cpu/flash/make_schedule.h"
#include "cpu/isa_kernels.h"
#include "reference/forward.h"

// Which ISA files this build has (cmake/isa.cmake).
#if !defined(FASTATTN_HAVE_AVX512BF16)
#define FASTATTN_HAVE_AVX512BF16 0
#endif
#if !defined(FASTATTN_HAVE_AVX512)
#define FASTATTN_HAVE_AVX512 0
#endif
#if !defined(FASTATTN_HAVE_AVX2)
#define FASTATTN_HAVE_AVX2 0
#endif
#if !defined(FASTATTN_HAVE_NEON)
#define FASTATTN_HAVE_NEON 0
#endif

namespace fastattn {
namespace cpu {
namespace {

using TableFn = const IsaKernels& (*)();
// Types are compared, not addresses: under -fsanitize=undefined GCC takes no address for constant.
template <TableFn table>
inline constexpr bool kAbsent =
    std::is_same_v<std::integral_constant<TableFn, table>, std::integral_constant<TableFn, nullptr>>;

#if FASTATTN_HAVE_AVX512BF16
constexpr TableFn avx512bf16_table = &avx512bf16_kernels;
#else
constexpr TableFn avx512bf16_table = nullptr;
#endif
#if FASTATTN_HAVE_AVX512
constexpr TableFn avx512_table = &avx512_kernels;
#else
constexpr TableFn avx512_table = nullptr;
#endif
#if FASTATTN_HAVE_AVX2
constexpr TableFn avx2_table = &avx2_kernels;
#else
constexpr TableFn avx2_table = nullptr;
#endif
#if FASTATTN_HAVE_NEON
constexpr TableFn neon_table = &neon_kernels;
#else
constexpr TableFn neon_table = nullptr;
#endif
constexpr TableFn scalar_table = &scalar_kernels;

[[maybe_unused]] const char* missing_nothing() noexcept { return nullptr; }

template <class Planned>
EntryAt lengths_in(const EntryTable<Planned>& entries) {
    return [&entries](std::int64_t b) -> const Entry& { return entry_at(entries, b).lengths; };
}

template <TableFn table>
const char* refuses_dtypes(const AttentionProblem& p) {
    return table().find(p) != nullptr ? nullptr : "it has no row for these dtypes of k and v beside q's";
}

template <TableFn table>
KernelPlan flash_plan(const AttentionProblem& p, Device, int threads, bool with_text) {
    const TileShape& tile = table().find(p)->tile;
    auto schedule = std::make_unique<const ForwardSchedule>(p, tile, threads);
    KernelPlan result;
    result.shared_bytes = schedule->flash().shared_bytes;
    result.per_thread_bytes = schedule->flash().per_thread_bytes;
    result.work_items = schedule->flash().items;
    if (with_text) result.algorithm = schedule->describe(p, tile);
    result.schedule = std::move(schedule);
    return result;
}

template <TableFn table>
void flash_run(const AttentionProblem& p, const Target&, const Workspace& workspace, Executor& executor) {
    const DtypeKernel& kernel = *table().find(p);
    const FlashSchedule& schedule = static_cast<const ForwardSchedule*>(workspace.schedule)->flash();
    // f(the call as an item of a phase sees it).
    const auto with_call = [&](Phase FlashEntry::* phase, std::int64_t item, auto f) {
        if (!p.packed()) return f(FlashCall{p, schedule, workspace.shared, executor});
        const AttentionProblem view = view_of(p, place_of(schedule.entries, phase, item).entry->lengths);
        f(FlashCall{view, schedule, workspace.shared, executor});
    };
    auto forward = [&](std::int64_t item, int slot) {
        std::byte* const own =
            workspace.per_thread + static_cast<std::size_t>(slot) * workspace.per_thread_stride;
        with_call(&FlashEntry::items, item, [&](const FlashCall& call) { kernel.forward(call, item, own); });
    };
    executor.for_each(schedule.items, forward, schedule.groups);
    if (schedule.merge_items > 0) {
        auto merge = [&](std::int64_t item, int) {
            with_call(&FlashEntry::merges, item, [&](const FlashCall& call) { kernel.merge(call, item); });
        };
        executor.for_each(schedule.merge_items, merge);
    }
    clear_padding(p, lengths_in(schedule.entries), executor);
}

template <TableFn table>
KernelPlan backward_plan(const BackwardProblem& p, Device, int threads, bool with_text) {
    const TileShape& tile = table().find(p.forward)->tile;
    auto schedule = std::make_unique<const GradientSchedule>(p, tile, threads);
    const BackwardSchedule& backward = schedule->backward();
    KernelPlan result;
    result.shared_bytes = backward.shared_bytes;
    result.per_thread_bytes = backward.per_thread_bytes;
    result.work_items = std::max(backward.items, backward.bias_items);
    if (with_text) result.algorithm = schedule->describe(tile);
    result.schedule = std::move(schedule);
    return result;
}

template <TableFn table>
void backward_run(const BackwardProblem& p, const Target&, const Workspace& workspace, Executor& executor) {
    const DtypeKernel& kernel = *table().find(p.forward);
    const BackwardSchedule& schedule = static_cast<const GradientSchedule*>(workspace.schedule)->backward();
    const bool packed = p.forward.packed();
    if (packed) clear_bias_gradient(p, executor);  // pairs outside of every entry
    const auto for_each = [&](BackwardPhase phase, std::int64_t items, std::int64_t groups) {
        Phase BackwardEntry::* const own = packed ? phase_of(p, phase) : nullptr;
        auto run = [&](std::int64_t item, int slot) {
            std::byte* const memory =
                workspace.per_thread + static_cast<std::size_t>(slot) * workspace.per_thread_stride;
            const auto on = [&](const BackwardProblem& problem) {
                kernel.backward({problem, schedule, workspace.shared, executor}, phase, item, memory);
            };
            if (own == nullptr) return on(p);
            on(view_of(p, place_of(schedule.entries, own, item).entry->lengths));
        };
        if (items > 0) executor.for_each(items, run, groups);
    };
    const std::int64_t heads = p.forward.batch * p.forward.q_heads;
    for_each(BackwardPhase::prepare, schedule.prepare_items, schedule.prepare_items);
    for_each(BackwardPhase::gradients, schedule.items, schedule.groups);
    for_each(BackwardPhase::merge, schedule.merge_items, heads);
    for_each(BackwardPhase::heads, schedule.head_items, 1);
    for_each(BackwardPhase::bias, schedule.bias_items, 1);
    if (packed)
        store_bias_sums(p, reinterpret_cast<const double*>(workspace.shared + schedule.bias_sums),
                        lengths_in(schedule.entries));
    clear_padding(p, lengths_in(schedule.entries), executor);
}

// A kernel that this build does not hold is listed all the same, with the reason.
template <TableFn table, const char* (*missing)() noexcept>
constexpr Kernel row(const char* name, std::span<const DType> dtypes, const char* (*not_built)()) {
    if constexpr (kAbsent<table>) {
        return {name, DeviceType::cpu, dtypes, not_built, {}};
    } else {
        return {name,
                DeviceType::cpu,
                dtypes,
                [] { return missing(); },
                {&refuses_dtypes<table>, &flash_plan<table>, &flash_run<table>},
                {[](const BackwardProblem& p) { return refuses_dtypes<table>(p.forward); },
                 &backward_plan<table>, &backward_run<table>}};
    }
}

#define FASTATTN_UNPACK(...) __VA_ARGS__
#define FASTATTN_CPU_KERNEL(id, architecture, dtypes, missing) \
    constexpr std::array id##_dtypes{FASTATTN_UNPACK dtypes};  \
    [[maybe_unused]] const char* id##_not_built() { return "not in this build: it is for " architecture; }
#include "cpu/kernels.inc"
#undef FASTATTN_CPU_KERNEL

}  // namespace

const IsaKernels* find_isa_kernels(std::string_view kernel) {
    TableFn table = nullptr;
#define FASTATTN_CPU_KERNEL(id, architecture, dtypes, missing) \
    if (kernel == "cpu-" #id) table = id##_table;
#include "cpu/kernels.inc"
#undef FASTATTN_CPU_KERNEL
    return table == nullptr ? nullptr : &table();
}

}  // namespace cpu

std::span<const Kernel> cpu_kernels() {
    using namespace cpu;
    static const std::array table{
#define FASTATTN_CPU_KERNEL(id, architecture, dtypes, missing) \
    row<id##_table, missing>("cpu-" #id, id##_dtypes, &id##_not_built),
#include "cpu/kernels.inc"
#undef FASTATTN_CPU_KERNEL
        cpu_reference_kernel};
    return table;
}

}  // namespace fastattn
