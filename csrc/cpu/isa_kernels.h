// What an ISA file gives to the baseline: plain function pointers for each combination of dtypes. Everything
// else in those files has internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include <fastattn/attention.h>

#include "cpu/backward/call.h"
#include "cpu/flash/call.h"

namespace fastattn::cpu {

struct DtypeKernel {
    DType q = DType::f32, k = DType::f32, v = DType::f32;
    TileShape tile{};
    // Items [0, plan.items), then [0, plan.merge_items). workspace: plan.per_thread_bytes, 64-byte aligned.
    void (*forward)(const FlashCall& call, std::int64_t item, std::byte* workspace) = nullptr;
    void (*merge)(const FlashCall& call, std::int64_t item) = nullptr;
    // Items of a phase: see BackwardPlan.
    void (*backward)(const BackwardCall& call, BackwardPhase phase, std::int64_t item,
                     std::byte* workspace) = nullptr;
};

struct IsaKernels {
    static constexpr int kMost = 4;
    DtypeKernel rows[kMost]{};
    int count = 0;
    // FLOPs done by so many iterations of independent multiply-adds: the ceiling of this ISA.
    double (*fma_burst_f64)(std::int64_t iterations) = nullptr;
    double (*fma_burst_f32)(std::int64_t iterations) = nullptr;
    double (*fma_burst_bf16)(std::int64_t iterations) = nullptr;

    constexpr void add(const DtypeKernel& row) { rows[count++] = row; }
    // nullptr where it has none for these dtypes.
    const DtypeKernel* find(const AttentionProblem& p) const {
        for (const DtypeKernel *row = rows, *end = rows + count; row != end; ++row) {
            if (row->q == p.dtype && row->k == p.k_dtype && row->v == p.v_dtype) return row;
        }
        return nullptr;
    }
};

const IsaKernels& avx512bf16_kernels();
const IsaKernels& avx512_kernels();
const IsaKernels& avx2_kernels();
const IsaKernels& neon_kernels();
const IsaKernels& scalar_kernels();

// The table of a kernel by name ("cpu-avx2"), nullptr where this build has none.
const IsaKernels* find_isa_kernels(std::string_view kernel);

}  // namespace fastattn::cpu
