// The table of the CUDA kernels, best first, and how a call reaches them.
#include <array>
#include <string>
#include <type_traits>

#include "core/environment.h"
#include "core/kernel.h"
#include "cuda/cublas/backward.h"
#include "cuda/cublas/forward.h"
#include "cuda/fused/decode/host.h"
#include "cuda/fused/sm80/host.h"
#include "cuda/fused/sm90/host.h"
#include "cuda/host/build_info.h"
#include "cuda/host/run.h"

namespace fastattn {
namespace cuda {
namespace {

constexpr DType kAllDtypes[] = {DType::f64, DType::f32, DType::f16, DType::bf16};
constexpr DType kHalfDtypes[] = {DType::f16, DType::bf16};

// cuBLAS counts the columns of a matrix in 32 bits, and so do the kernels the keys of a row.
const char* refuses(const AttentionProblem& p) {
    if (const char* why = refuses_everywhere(p)) return why;
    constexpr Index most = (Index{1} << 31) - 1024;
    return whole(p).keys > most ? "a row attends more than 2**31 keys" : nullptr;
}

// ---- the table --------------------------------------------------------------------------------------------
// Kernels with products of cuBLAS are told whether these may be in TF32.
template <class Computes>
Computes kernel_on(const DeviceContext& device) {
    if constexpr (std::is_constructible_v<Computes, const DeviceContext&, bool>) {
        return Computes(device, environment().tf32);
    } else {
        return Computes(device);
    }
}

template <class Computes, class Problem>
KernelPlan plan(const Problem& p, Device device, int threads, bool describe) {
    return plan_call<Problem>(kernel_on<Computes>(context(device.index)), p, threads, describe);
}

template <class Computes, class Problem>
void run(const Problem& p, const Target& target, const Workspace&, Executor& executor) {
    const DeviceContext& device = context(target.device.index);
    run_call<Problem>(kernel_on<Computes>(device), device, p, target.stream, executor);
}

constexpr const char* kUnproven =
    "no GPU has run it yet (docs/gpu_status.md), so it is taken only when asked for by name";

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
            .forward = {.refuses = &Fused::refuses, .plan = &plan<Fused>, .run = &run<Fused>},
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
        .forward = {.refuses = &refuses, .plan = &plan<CublasAttention>, .run = &run<CublasAttention>},
        .backward = {
            .refuses = &CublasBackward::refuses, .plan = &plan<CublasBackward>, .run = &run<CublasBackward>}};
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
