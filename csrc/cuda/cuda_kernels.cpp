// The table of the CUDA kernels, best first, and how a call reaches them: arrays on the device are used where they lie, in the
// caller's stream and without waiting; host arrays are staged.
#include <array>
#include <string>
#include <vector>

#include "core/environment.h"
#include "core/kernel.h"
#include "core/scalar_access.h"
#include "cuda/attention_cublas.h"
#include "cuda/staging.h"

namespace fastattn {
namespace cuda {
namespace {

constexpr DType kDtypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};

// cuBLAS counts the columns of a matrix in 32 bits, and so do the kernels the keys of a row.
const char* refuses(const AttentionProblem& p) {
    constexpr Index most = (Index{1} << 31) - 1024;
    return whole(p).keys > most ? "a row attends more than 2**31 keys" : nullptr;
}

bool is_empty(const AttentionProblem& p) noexcept { return p.batch == 0 || p.kv_heads == 0 || p.q_size == 0; }

// Of a staged unit only sizes are known before it is there.
AttentionProblem unit_problem(const AttentionProblem& p, const Chunk& unit) noexcept {
    return place_unit(p, unit, lay_out_unit(p, unit), nullptr, nullptr, nullptr);
}

// Chunks of a whole call, staged or not.
struct ChunkCount {
    Index chunks = 0;
    Chunk first;
};
ChunkCount count_chunks(const AttentionProblem& p, bool staged, std::size_t limit) {
    ChunkCount count;
    const auto walk = [&](const Chunk& region) {
        Chunks chunks(p, region, limit);
        for (Chunk chunk; chunks.next(chunk); ++count.chunks)
            if (count.chunks == 0) count.first = chunk;
    };
    if (!staged) {
        walk(whole(p));
        return count;
    }
    Units units(p);
    bool same_keys = false;
    for (Chunk unit; units.next(unit, same_keys);) walk(unit);
    return count;
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

KernelPlan cublas_plan(const AttentionProblem& asked, Device device, int threads, bool describe) {
    const DeviceProperties& properties = context(device.index).properties;
    const Frozen frozen(asked);
    const AttentionProblem& p = frozen.problem();
    const bool staged = p.device.type == DeviceType::cpu;
    KernelPlan plan;
    if (is_empty(p)) {
        plan.algorithm = "nothing to compute";
        return plan;
    }
    const Chunk region = staged ? Units(p).largest() : whole(p);
    const AttentionProblem laid = staged ? unit_problem(p, region) : p;
    const CublasWorkspace w = lay_out(p, laid, region, properties, nullptr);
    plan.device_bytes = w.bytes + (staged ? staged_bytes(p) : side_bytes(p, true));
    plan.work_items = staged ? threads : 1;  // of the host: the threads copy
    if (describe) {
        const ChunkCount count = count_chunks(p, staged, w.limit);
        plan.algorithm = "cuBLAS, scores in " + std::to_string(count.chunks) + " chunk" +
                         (count.chunks == 1 ? "" : "s") + ", the first of " +
                         std::to_string(count.first.rows) + " rows x " +
                         std::to_string(count.first.batches * count.first.kv_heads * p.group) + " heads";
        if (staged)
            plan.algorithm += ", arrays staged in " + std::to_string(Units(p).count()) + " unit" +
                              (Units(p).count() == 1 ? "" : "s");
        if (environment().tf32 && p.dtype == DType::f32) plan.algorithm += ", TF32";
    }
    return plan;
}

class CublasUnit final : public UnitKernel {
public:
    explicit CublasUnit(const DeviceContext& context) : context_(context) {}
    void queue(const AttentionProblem& host, const AttentionProblem& device, const Chunk& unit,
               std::byte* workspace, Stream stream) const override {
        const CublasWorkspace w = lay_out(host, device, unit, context_.properties, workspace);
        attend(host, device, unit, w, context_, stream, environment().tf32);
    }

private:
    const DeviceContext& context_;
};

void cublas_run(const AttentionProblem& asked, const Target& target, const Workspace&, Executor& executor) {
    if (is_empty(asked)) return;
    const Frozen frozen(asked);
    const AttentionProblem& p = frozen.problem();
    const DeviceContext& device = context(target.device.index);
    const CurrentDevice current(device.index);
    const CublasUnit kernel(device);
    if (p.device.type == DeviceType::cpu) {
        const Chunk unit = Units(p).largest();
        const std::size_t bytes = lay_out(p, unit_problem(p, unit), unit, device.properties, nullptr).bytes;
        return run_staged(p, device, bytes, kernel, executor);
    }
    AttentionProblem on_device = p;
    const std::size_t sides = side_bytes(p, true);
    const std::size_t bytes = lay_out(p, p, whole(p), device.properties, nullptr).bytes;
    const DeviceMemory memory(device, sides + bytes, target.stream, "the device's workspace");
    upload_sides(p, true, memory.data(), on_device, target.stream, executor);
    kernel.queue(p, on_device, whole(p), memory.data() + sides, target.stream);
}

const char* why_unavailable() { return unavailable(); }

}  // namespace
}  // namespace cuda

std::span<const Kernel> cuda_kernels() {
    using namespace cuda;
    static constexpr std::array<Kernel, 1> table{{{.name = "cuda-cublas",
                                                   .device = DeviceType::cuda,
                                                   .dtypes = kDtypes,
                                                   .unavailable = &why_unavailable,
                                                   .refuses = &refuses,
                                                   .plan = &cublas_plan,
                                                   .run = &cublas_run}}};
    return table;
}

}  // namespace fastattn
