// The table of the CUDA kernels, best first, and how a call reaches them: arrays on the device are used where they lie, in the
// caller's stream and without waiting; host arrays are staged.
#include <array>
#include <string>
#include <vector>

#include "core/environment.h"
#include "core/kernel.h"
#include "core/scalar_access.h"
#include "cuda/cublas/backward.h"
#include "cuda/cublas/backward_staging.h"
#include "cuda/cublas/forward.h"
#include "cuda/fused/decode/host.h"
#include "cuda/fused/sm80/host.h"
#include "cuda/fused/sm90/host.h"
#include "cuda/host/build_info.h"
#include "cuda/host/errors.h"
#include "cuda/host/staging.h"

namespace fastattn {
namespace cuda {
namespace {

constexpr DType kAllDtypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};
constexpr DType kHalfDtypes[] = {DType::f16, DType::bf16};

// cuBLAS counts the columns of a matrix in 32 bits, and so do the kernels the keys of a row.
const char* refuses(const AttentionProblem& p) {
    constexpr Index most = (Index{1} << 31) - 1024;
    return whole(p).keys > most ? "a row attends more than 2**31 keys" : nullptr;
}

// Of a staged unit only sizes are known before it is there.
AttentionProblem unit_problem(const AttentionProblem& p, const Chunk& unit) noexcept {
    return place_unit(p, unit, lay_out_unit(p, unit), nullptr, nullptr, nullptr);
}

// A problem whose lengths and offsets nobody else can change while sizes of memory are derived from them.
class Frozen {
public:
    explicit Frozen(const AttentionProblem& p) : problem_(p) {
        for (const auto side :
             {&AttentionProblem::q_lens, &AttentionProblem::kv_lens, &AttentionProblem::q_offsets}) {
            HeadOperand& x = problem_.*side;
            if (x.data == nullptr || x.place != DeviceType::cpu) continue;
            std::vector<std::int64_t>& values = values_[kept_++];
            for (Index b = 0; b < p.batch; ++b) values.push_back(load_integer(x.data, x.dtype, b * x.batch));
            x = {values.data(), DType::i64, 1, 0, DeviceType::cpu};
        }
    }
    Frozen(const Frozen&) = delete;
    Frozen& operator=(const Frozen&) = delete;
    const AttentionProblem& problem() const noexcept { return problem_; }

private:
    AttentionProblem problem_;
    std::array<std::vector<std::int64_t>, 3> values_;
    std::size_t kept_ = 0;
};

std::string in_units(Index units) {
    return ", arrays staged in " + std::to_string(units) + " unit" + (units == 1 ? "" : "s");
}

// Of side arrays that are still on the host; refused while the stream is captured.
std::size_t bytes_of_sides(const AttentionProblem& p, Stream stream) {
    const std::size_t bytes = side_bytes(p, true);
    if (bytes == 0) return 0;
    bool capturing = false;
    throw_on_error(runtime::is_capturing(stream, &capturing), "asking whether the stream is captured");
    if (capturing)
        throw UnsupportedError(
            "device: a call that is captured into a CUDA graph needs all of its arrays on the device, and a "
            "side "
            "array (mask, bias, alibi_slopes, sinks, q_lens, kv_lens or q_offset) is on the host");
    return bytes;
}

KernelPlan plan_with(const DeviceKernel& kernel, const AttentionProblem& asked, int threads, bool describe) {
    KernelPlan plan;
    if (is_empty(asked)) {
        plan.algorithm = "nothing to compute";
        return plan;
    }
    const Frozen frozen(asked);
    const AttentionProblem& p = frozen.problem();
    const bool staged = p.device.type == DeviceType::cpu;
    const Chunk region = staged ? Units(p).largest() : whole(p);
    plan.device_bytes = kernel.workspace_bytes(p, staged ? unit_problem(p, region) : p, region) +
                        (staged ? staged_bytes(p) : side_bytes(p, true));
    plan.work_items = staged ? threads : 1;  // of the host: the threads copy
    if (describe) {
        plan.algorithm = kernel.describe(p, staged);
        if (staged) plan.algorithm += in_units(Units(p).count());
    }
    return plan;
}

void run_with(const DeviceKernel& kernel, const DeviceContext& device, const AttentionProblem& asked,
              const Target& target, Executor& executor) {
    if (is_empty(asked)) return;
    const Frozen frozen(asked);
    const AttentionProblem& p = frozen.problem();
    const CurrentDevice current(device.index);
    if (p.device.type == DeviceType::cpu) {
        const Chunk unit = Units(p).largest();
        return run_staged(p, device, kernel.workspace_bytes(p, unit_problem(p, unit), unit), kernel,
                          executor);
    }
    AttentionProblem on_device = p;
    const std::size_t sides = bytes_of_sides(p, target.stream);
    const std::size_t bytes = kernel.workspace_bytes(p, p, whole(p));
    const DeviceMemory memory(device, sides + bytes, target.stream, "the device's workspace");
    upload_sides(p, true, memory.data(), on_device, target.stream, executor);
    kernel.queue(p, on_device, whole(p), memory.data() + sides, target.stream);
}

// ---- the backward pass ------------------------------------------------------------------------------------------
BackwardProblem with_forward(const BackwardProblem& b, const AttentionProblem& forward) noexcept {
    BackwardProblem changed = b;
    changed.forward = forward;
    return changed;
}

// Sizes of zero are nothing special: what has elements is zero, or the gradient of a sink without keys.
KernelPlan cublas_backward_plan(const BackwardProblem& asked, Device device, int threads, bool describe) {
    const CublasBackward kernel(context(device.index), environment().tf32);
    const Frozen frozen(asked.forward);
    const BackwardProblem b = with_forward(asked, frozen.problem());
    const bool staged = b.forward.device.type == DeviceType::cpu;
    KernelPlan plan;
    plan.device_bytes =
        staged ? staged_backward_bytes(b, kernel)
               : side_bytes(b.forward, true) + sums_bytes(b) + kernel.workspace_bytes(b, b, whole(b.forward));
    plan.work_items = staged ? threads : 1;  // of the host: the threads copy
    if (describe) plan.algorithm = kernel.describe(b) + (staged ? in_units(BackwardUnits(b).count()) : "");
    return plan;
}

void cublas_backward_run(const BackwardProblem& asked, const Target& target, const Workspace&,
                         Executor& executor) {
    const DeviceContext& device = context(target.device.index);
    const CublasBackward kernel(device, environment().tf32);
    const Frozen frozen(asked.forward);
    const BackwardProblem b = with_forward(asked, frozen.problem());
    const AttentionProblem& p = b.forward;
    const CurrentDevice current(device.index);
    if (p.device.type == DeviceType::cpu) return run_staged_backward(b, device, kernel, executor);
    BackwardProblem on_device = b;
    const std::size_t sides = bytes_of_sides(p, target.stream), sums = sums_bytes(b);
    const std::size_t bytes = kernel.workspace_bytes(b, b, whole(p));
    const DeviceMemory memory(device, sides + sums + bytes, target.stream, "the device's workspace");
    upload_sides(p, true, memory.data(), on_device.forward, target.stream, executor);
    std::byte* const block = memory.data() + sides;
    kernel.queue_start(on_device, block, target.stream);
    kernel.queue(b, on_device, whole(p), block + sums, block, target.stream);
    kernel.queue_finish(on_device, block, target.stream);
}

// ---- the table ----------------------------------------------------------------------------------------------------
KernelPlan cublas_plan(const AttentionProblem& p, Device device, int threads, bool describe) {
    return plan_with(CublasAttention(context(device.index), environment().tf32), p, threads, describe);
}

void cublas_run(const AttentionProblem& p, const Target& target, const Workspace&, Executor& executor) {
    const DeviceContext& device = context(target.device.index);
    run_with(CublasAttention(device, environment().tf32), device, p, target, executor);
}

constexpr const char* kUnproven =
    "no GPU has run it yet (docs/gpu_status.md), so it is taken only when asked for by name";

template <class Fused>
KernelPlan fused_plan(const AttentionProblem& p, Device device, int threads, bool describe) {
    return plan_with(Fused(context(device.index)), p, threads, describe);
}

template <class Fused>
void fused_run(const AttentionProblem& p, const Target& target, const Workspace&, Executor& executor) {
    const DeviceContext& device = context(target.device.index);
    run_with(Fused(device), device, p, target, executor);
}

std::string number_of(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

template <class Fused>
std::string fused_refuses_device(Device device) {
    const DeviceProperties& gpu = context(device.index).properties;
    const int capability = 10 * gpu.major + gpu.minor;
    if (!Fused::kBuilt)
        return "this build has no code for compute capability " + number_of(Fused::kLeast) + " (" +
               build_info() + ")";
    if (capability >= Fused::kLeast && capability <= Fused::kMost) return {};
    return "needs compute capability " + number_of(Fused::kLeast) +
           (Fused::kMost == Fused::kLeast ? " and no other, " : " or newer, ") + gpu.name + " has " +
           number_of(capability);
}

template <class Fused>
constexpr Kernel row(const char* name, std::span<const DType> dtypes) {
    return {.name = name,
            .device = DeviceType::cuda,
            .dtypes = dtypes,
            .unavailable = &cuda_unavailable,
            .forward = {.refuses = &Fused::refuses, .plan = &fused_plan<Fused>, .run = &fused_run<Fused>},
            .refuses_device = &fused_refuses_device<Fused>,
            .unproven = kUnproven};
}

template <>
constexpr Kernel row<CublasAttention>(const char* name, std::span<const DType> dtypes) {
    return {
        .name = name,
        .device = DeviceType::cuda,
        .dtypes = dtypes,
        .unavailable = &cuda_unavailable,
        .forward = {.refuses = &refuses, .plan = &cublas_plan, .run = &cublas_run},
        .backward = {
            .refuses = &CublasBackward::refuses, .plan = &cublas_backward_plan, .run = &cublas_backward_run}};
}

}  // namespace
}  // namespace cuda

std::span<const Kernel> cuda_kernels() {
    using namespace cuda;
    static constexpr std::array table{
#define FASTATTN_CUDA_KERNEL(name, type, dtypes) row<type>(name, dtypes),
#include "cuda/kernels.inc"
#undef FASTATTN_CUDA_KERNEL
    };
    return table;
}

}  // namespace fastattn
