#include "cuda/host/run.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "core/scalar_access.h"
#include "cuda/host/errors.h"
#include "cuda/host/packed.h"
#include "cuda/host/staging.h"

namespace fastattn::cuda {
namespace {

// A problem whose lengths and offsets nobody else can change while sizes of memory are derived from them.
template <class Problem>
class Frozen {
public:
    explicit Frozen(const Problem& asked) : problem_(asked) {
        AttentionProblem& p = forward_of(problem_);
        for (const auto side :
             {&AttentionProblem::q_lens, &AttentionProblem::kv_lens, &AttentionProblem::q_offsets})
            keep(p.*side, p.batch);
        for (const auto bounds : {&AttentionProblem::cu_q, &AttentionProblem::cu_kv})
            keep(p.*bounds, p.batch + 1);
    }
    Frozen(const Frozen&) = delete;
    Frozen& operator=(const Frozen&) = delete;
    const Problem& problem() const noexcept { return problem_; }

private:
    void keep(HeadOperand& x, Index count) {
        if (x.data == nullptr || x.place != DeviceType::cpu) return;
        std::vector<std::int64_t>& values = values_[kept_++];
        for (Index b = 0; b < count; ++b) values.push_back(load_integer(x.data, x.dtype, b * x.batch));
        x = {values.data(), DType::i64, 1, 0, DeviceType::cpu};
    }

    Problem problem_;
    std::array<std::vector<std::int64_t>, 5> values_;
    std::size_t kept_ = 0;
};

bool has_results(const AttentionProblem& p) noexcept { return !is_empty(p); }
// Sizes of zero are nothing special: what has elements is zero, or the gradient of a sink without keys.
bool has_results(const BackwardProblem&) noexcept { return true; }

// The device's memory of a call on its arrays.
struct CallMemory {
    std::byte* sides = nullptr;
    KernelMemory kernel;
    std::size_t side_bytes = 0, bytes = 0;
};

template <class Problem>
CallMemory lay_out_call(const Problem& p, const DeviceKernel<Problem>& kernel, std::byte* block) {
    const Chunk all = whole(forward_of(p));
    CallMemory memory;
    Carver carver(block);
    memory.side_bytes = lay_out(p, all).bytes(Travel::side);
    memory.sides = carver.take(memory.side_bytes);
    memory.kernel.sums = carver.take(kernel.sums_bytes(p));
    memory.kernel.workspace = carver.take(kernel.workspace_bytes(p, p, all));
    memory.bytes = carver.used();
    return memory;
}

void refuse_sides_of_captured_calls(Stream stream) {
    bool capturing = false;
    throw_on_error(runtime::is_capturing(stream, &capturing), "asking whether the stream is captured");
    if (capturing)
        throw UnsupportedError(
            "device: a call that is captured into a CUDA graph needs all of its arrays on the device, and a "
            "side array (mask, bias, alibi_slopes, sinks, q_lens, kv_lens or q_offset) is on the host");
}

}  // namespace

template <class Problem>
KernelPlan plan_call(const DeviceKernel<Problem>& kernel, const Problem& asked, int threads, bool describe) {
    KernelPlan plan;
    if (!has_results(asked)) {
        plan.algorithm = "nothing to compute";
        return plan;
    }
    const Frozen frozen(asked);
    const Problem& p = frozen.problem();
    if (forward_of(p).packed()) {
        std::int64_t entries = 0;
        for (const Problem& one : entry_problems(p)) {
            KernelPlan own = plan_call(kernel, one, threads, describe && plan.algorithm.empty());
            plan.device_bytes = std::max(plan.device_bytes, own.device_bytes);
            plan.work_items = std::max(plan.work_items, own.work_items);
            if (plan.algorithm.empty()) plan.algorithm = std::move(own.algorithm);
            ++entries;
        }
        if (describe)
            plan.algorithm += ", " + std::to_string(entries) + " calls, one for each packed entry or gap";
        return plan;
    }
    const bool staged = forward_of(p).device.type == DeviceType::cpu;
    plan.device_bytes = staged ? staged_bytes(p, kernel) : lay_out_call(p, kernel, nullptr).bytes;
    plan.work_items = staged ? threads : 1;  // of the host: the threads copy
    if (describe) plan.algorithm = kernel.describe(p, staged);
    if (describe && staged) {
        const Index units = Units(p).count();
        plan.algorithm += ", arrays staged in " + std::to_string(units) + " unit" + (units == 1 ? "" : "s");
    }
    return plan;
}

template <class Problem>
void run_call(const DeviceKernel<Problem>& kernel, const DeviceContext& device, const Problem& asked,
              Stream stream, Executor& executor) {
    if (!has_results(asked)) return;
    const Frozen frozen(asked);
    const Problem& p = frozen.problem();
    if (forward_of(p).packed()) {
        for (const Problem& one : entry_problems(p)) run_call(kernel, device, one, stream, executor);
        return;
    }
    const CurrentDevice current(device.index);
    if (forward_of(p).device.type == DeviceType::cpu) return run_staged(p, device, kernel, executor);
    const CallMemory sizes = lay_out_call(p, kernel, nullptr);
    if (sizes.side_bytes > 0) refuse_sides_of_captured_calls(stream);
    const DeviceMemory block(device, sizes.bytes, stream, "the device's workspace");
    const CallMemory memory = lay_out_call(p, kernel, block.data());
    Problem on_device = p;
    upload_sides(p, memory.sides, on_device, stream, executor);
    kernel.queue_start(on_device, memory.kernel.sums, stream);
    kernel.queue(p, on_device, whole(forward_of(p)), memory.kernel, stream);
    kernel.queue_finish(on_device, memory.kernel.sums, stream);
}

#define FASTATTN_FOR(Problem)                                                                          \
    template KernelPlan plan_call(const DeviceKernel<Problem>&, const Problem&, int, bool);            \
    template void run_call(const DeviceKernel<Problem>&, const DeviceContext&, const Problem&, Stream, \
                           Executor&)
FASTATTN_FOR(AttentionProblem);
FASTATTN_FOR(BackwardProblem);
#undef FASTATTN_FOR

}  // namespace fastattn::cuda
