#include "cuda/blas/gemm.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include <fastattn/attention.h>

#include "cuda/host/errors.h"
#include "cuda/simt/launch.h"

namespace fastattn::cuda {
namespace {

using Index = std::int64_t;
using cublas::Status;

constexpr std::size_t kPlansKept = 4096;

Index item_bytes(cublas::DataType type) noexcept {
    switch (type) {
        case cublas::kF64: return 8;
        case cublas::kF32: return 4;
        default: return 2;
    }
}

// The largest power of two, up to 16, that divides the address and all steps. More would make the algorithm,
// and so the bits of a result, depend on where an array happens to lie.
std::uint32_t alignment_of(const GemmOperand& x, const std::array<Index, kBatchAxes>& count) noexcept {
    auto bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(x.data)) | 16u;
    for (int axis = 0; axis < kBatchAxes; ++axis)
        if (count[axis] > 1) bits |= static_cast<std::uint64_t>(x.stride[axis] * item_bytes(x.type));
    return static_cast<std::uint32_t>(bits & (~bits + 1));
}

void* advance(const GemmOperand& x, Index elements) noexcept {
    return static_cast<char*>(x.data) + elements * item_bytes(x.type);
}

}  // namespace

void throw_on_status(const cublas::Table& table, cublas::Status status, const char* attempted) {
    if (status == cublas::kSuccess) return;
    throw CudaError(std::string("cuBLAS: ") + attempted + " failed: " + table.GetStatusName(status), false);
}

Gemm merge_axes(const Gemm& gemm) noexcept {
    GemmOperand Gemm::* const operands[] = {&Gemm::a, &Gemm::b, &Gemm::c};
    Gemm out = gemm;
    out.count = {1, 1, 1};
    for (const auto x : operands) (out.*x).stride = {};
    int axes = 0;
    for (int axis = 0; axis < kBatchAxes; ++axis) {
        if (gemm.count[axis] == 1) continue;
        const int last = axes - 1;
        const bool continues =
            axes > 0 && std::all_of(std::begin(operands), std::end(operands), [&](const auto x) {
                return (out.*x).stride[last] == gemm.count[axis] * (gemm.*x).stride[axis];
            });
        const int to = continues ? last : axes++;
        out.count[to] = (continues ? out.count[to] : 1) * gemm.count[axis];
        for (const auto x : operands) (out.*x).stride[to] = (gemm.*x).stride[axis];
    }
    const auto most =
        static_cast<int>(std::max_element(out.count.begin(), out.count.end()) - out.count.begin());
    std::swap(out.count[most], out.count[kBatchAxes - 1]);
    for (const auto x : operands) std::swap((out.*x).stride[most], (out.*x).stride[kBatchAxes - 1]);
    return out;
}

Index strided_calls(const Gemm& merged) noexcept { return merged.count[0] * merged.count[1]; }

GemmKey key_of(const Gemm& g, bool pointer_arrays) noexcept {
    GemmKey key;
    key.transpose_a = g.transpose_a;
    key.transpose_b = g.transpose_b;
    key.pointer_arrays = pointer_arrays;
    key.compute = g.compute;
    key.type = {g.a.type, g.b.type, g.c.type};
    key.alignment = {alignment_of(g.a, g.count), alignment_of(g.b, g.count), alignment_of(g.c, g.count)};
    key.size = {g.m, g.n, g.k};
    key.ld = {g.a.ld, g.b.ld, g.c.ld};
    key.batch = pointer_arrays ? g.entries() : g.count[kBatchAxes - 1];
    if (!pointer_arrays && key.batch > 1)
        key.stride = {g.a.stride[kBatchAxes - 1], g.b.stride[kBatchAxes - 1], g.c.stride[kBatchAxes - 1]};
    return key;
}

std::size_t GemmPlans::Hash::operator()(const GemmKey& key) const noexcept {
    std::uint64_t hash = 0xcbf29ce484222325u;
    const auto mix = [&](auto value) {
        hash = (hash ^ static_cast<std::uint64_t>(value)) * 0x100000001b3u;
        hash ^= hash >> 29;
    };
    mix(key.transpose_a);
    mix(key.transpose_b);
    mix(key.pointer_arrays);
    mix(key.compute);
    mix(key.batch);
    for (int x = 0; x < 3; ++x) {
        mix(key.type[x]);
        mix(key.alignment[x]);
        mix(key.size[x]);
        mix(key.ld[x]);
        mix(key.stride[x]);
    }
    return static_cast<std::size_t>(hash);
}

class GemmPlan {
public:
    GemmPlan(const cublas::Table& table, cublas::Handle handle, const GemmKey& key,
             std::size_t workspace_at_most)
        : table_(table) {
        try {
            describe(key);
            choose(handle, key, workspace_at_most);
        } catch (...) {
            destroy();
            throw;
        }
    }
    ~GemmPlan() { destroy(); }
    GemmPlan(const GemmPlan&) = delete;
    GemmPlan& operator=(const GemmPlan&) = delete;

    mutable std::atomic<bool> supported{false};  // false: the library has no algorithm for it
    cublas::Descriptor descriptor = nullptr;
    std::array<cublas::Layout, 3> layout{};
    cublas::Algorithm algorithm{};
    std::size_t workspace_bytes = 0;
    bool in_double = false;

private:
    void check(Status status, const char* attempted) const { throw_on_status(table_, status, attempted); }

    template <class T>
    void set(cublas::Layout x, cublas::LayoutAttribute attribute, T value) const {
        check(table_.MatrixLayoutSetAttribute(x, attribute, &value, sizeof value), "describing a matrix");
    }

    void describe(const GemmKey& key) {
        in_double = key.compute == cublas::kCompute64F;
        check(table_.MatmulDescCreate(&descriptor, key.compute, in_double ? cublas::kF64 : cublas::kF32),
              "describing a product");
        const auto transpose = [&](cublas::DescriptorAttribute operand, bool transposed) {
            const std::int32_t op = transposed ? cublas::kTranspose : cublas::kNone;
            check(table_.MatmulDescSetAttribute(descriptor, operand, &op, sizeof op), "describing a product");
        };
        transpose(cublas::kTransposeA, key.transpose_a);
        if (key.transpose_b) transpose(cublas::kTransposeB, true);
        const auto [m, n, k] = key.size;
        const Index rows[] = {key.transpose_a ? k : m, key.transpose_b ? n : k, m},
                    columns[] = {key.transpose_a ? m : k, key.transpose_b ? k : n, n};
        for (int x = 0; x < 3; ++x) {
            check(table_.MatrixLayoutCreate(&layout[x], key.type[x], static_cast<std::uint64_t>(rows[x]),
                                            static_cast<std::uint64_t>(columns[x]), key.ld[x]),
                  "describing a matrix");
            set(layout[x], cublas::kBatchCount, static_cast<std::int32_t>(key.batch));
            if (key.pointer_arrays) {
                set(layout[x], cublas::kBatchMode, static_cast<std::uint32_t>(cublas::kPointerArray));
            } else {
                set(layout[x], cublas::kBatchStride, key.stride[x]);
            }
        }
    }

    void choose(cublas::Handle handle, const GemmKey& key, std::size_t workspace_at_most) {
        cublas::Preference preference = nullptr;
        check(table_.MatmulPreferenceCreate(&preference), "choosing an algorithm");
        const auto set_preference = [&](cublas::PreferenceAttribute attribute, auto value) {
            return table_.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
        };
        Status status =
            set_preference(cublas::kMaxWorkspaceBytes, static_cast<std::uint64_t>(workspace_at_most));
        // Partial sums are added in the accumulator's type: those in the output's would be rounded twice.
        if (status == cublas::kSuccess)
            status = set_preference(cublas::kReductionSchemeMask, cublas::kReductionComputeType);
        const cublas::PreferenceAttribute alignments[] = {cublas::kMinAlignmentA, cublas::kMinAlignmentB,
                                                          cublas::kMinAlignmentC};
        for (int x = 0; x < 3 && status == cublas::kSuccess; ++x)
            status = set_preference(alignments[x], key.alignment[x]);
        if (status == cublas::kSuccess) status = set_preference(cublas::kMinAlignmentD, key.alignment[2]);
        cublas::HeuristicResult result{};
        int found = 0;
        if (status == cublas::kSuccess)
            status = table_.MatmulAlgoGetHeuristic(handle, descriptor, layout[0], layout[1], layout[2],
                                                   layout[2], preference, 1, &result, &found);
        table_.MatmulPreferenceDestroy(preference);
        if (status != cublas::kSuccess && status != cublas::kNotSupported && status != cublas::kInvalidValue)
            check(status, "choosing an algorithm");
        supported = status == cublas::kSuccess && found > 0 && result.state == cublas::kSuccess &&
                    result.workspace_bytes <= workspace_at_most;
        algorithm = result.algorithm;
        workspace_bytes = result.workspace_bytes;
    }

    void destroy() noexcept {
        for (cublas::Layout& x : layout)
            if (x != nullptr) table_.MatrixLayoutDestroy(std::exchange(x, nullptr));
        if (descriptor != nullptr) table_.MatmulDescDestroy(std::exchange(descriptor, nullptr));
    }

    const cublas::Table& table_;
};

GemmPlans::GemmPlans(const cublas::Table& table, cublas::Handle handle, std::size_t workspace_bytes)
    : table_(table), handle_(handle), workspace_bytes_(workspace_bytes) {}

GemmPlans::~GemmPlans() = default;

std::shared_ptr<const GemmPlan> GemmPlans::find(const GemmKey& key) {
    const std::lock_guard lock(mutex_);
    if (const auto known = plans_.find(key); known != plans_.end()) return known->second;
    if (plans_.size() >= kPlansKept) plans_.clear();  // who uses one still holds it
    auto plan = std::make_shared<const GemmPlan>(table_, handle_, key, workspace_bytes_);
    plans_.emplace(key, plan);
    return plan;
}

cublas::Status GemmPlans::call(const GemmPlan& plan, const Place& place, const Gemm& gemm, const void* a,
                               const void* b, void* c) const {
    const double kept_double = gemm.accumulate ? 1.0 : 0.0;
    const float single = static_cast<float>(gemm.factor), kept = static_cast<float>(kept_double);
    const void* alpha = plan.in_double ? static_cast<const void*>(&gemm.factor) : &single;
    const void* beta = plan.in_double ? static_cast<const void*>(&kept_double) : &kept;
    return table_.Matmul(handle_, plan.descriptor, alpha, a, plan.layout[0], b, plan.layout[1], beta, c,
                         plan.layout[2], c, plan.layout[2], &plan.algorithm, place.workspace,
                         plan.workspace_bytes, place.stream);
}

bool GemmPlans::run_by_pointers(const Gemm& g, const Place& place) {
    const auto plan = find(key_of(g, true));
    if (!plan->supported) return false;
    PointerArgs args;
    args.pointers = place.pointers;
    std::copy_n(g.count.begin(), kBatchAxes, args.count);
    const GemmOperand* operands[] = {&g.a, &g.b, &g.c};
    for (int x = 0; x < 3; ++x) {
        args.base[x] = static_cast<char*>(operands[x]->data);
        for (int axis = 0; axis < kBatchAxes; ++axis)
            args.stride[x][axis] = operands[x]->stride[axis] * item_bytes(operands[x]->type);
    }
    launch_pointers(args, place.stream);
    throw_on_error(runtime::last_error(), "launching fill_pointers");
    const Index n = g.entries();
    const Status status = call(*plan, place, g, place.pointers, place.pointers + n, place.pointers + 2 * n);
    if (status == cublas::kNotSupported ||
        status == cublas::kInvalidValue) {  // the heuristic promised too much
        plan->supported = false;
        return false;
    }
    throw_on_status(table_, status, "a product");
    return true;
}

void GemmPlans::run(const Gemm& gemm, const Place& place) {
    const Gemm g = merge_axes(gemm);
    const bool many = strided_calls(g) > kStridedCallsAtMost && g.entries() <= kBatchAtMost;
    if (many && place.pointers != nullptr && run_by_pointers(g, place)) return;
    constexpr int last = kBatchAxes - 1;
    for (Index first = 0; first < g.count[last]; first += kBatchAtMost) {
        Gemm part = g;
        part.count[last] = std::min(kBatchAtMost, g.count[last] - first);
        const auto plan = find(key_of(part, false));
        if (!plan->supported)
            throw CudaError("cuBLAS: no algorithm for a product of m=" + std::to_string(g.m) + ", n=" +
                                std::to_string(g.n) + ", k=" + std::to_string(g.k) + " on this device",
                            false);
        for (Index i = 0; i < g.count[0]; ++i) {
            for (Index j = 0; j < g.count[1]; ++j) {
                const auto at = [&](const GemmOperand& x) {
                    return advance(x, i * x.stride[0] + j * x.stride[1] + first * x.stride[last]);
                };
                throw_on_status(table_, call(*plan, place, g, at(g.a), at(g.b), at(g.c)), "a product");
            }
        }
    }
}

}  // namespace fastattn::cuda
