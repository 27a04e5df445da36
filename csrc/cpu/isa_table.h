// The table of an ISA file: the algorithms instantiated for its vectors.
#pragma once

#include <type_traits>

#include "cpu/backward/backward.h"
#include "cpu/flash/decode.h"
#include "cpu/flash/prefill.h"
#include "cpu/fma_burst.h"
#include "cpu/isa_kernels.h"

namespace fastattn::cpu {
namespace {

// E: the engine, F: that of decode's values where E does not take them (fused multiply-add); S, K, W: dtypes
// of q, k, v.
template <class E, class F, class S, class K, class W>
void flash_forward(const FlashCall& call, std::int64_t number, std::byte* workspace) {
    const ItemRange item = item_range(call, number);
    if (item.entry->plan.decode) {
        decode_item<E, F, S, K, W>(call, item, workspace);
    } else {
        prefill_item<E, S, K, W>(call, item, workspace);
    }
}

template <class S>
constexpr DType dtype_of() {
    if (std::is_same_v<S, double>) return DType::f64;
    if (std::is_same_v<S, float>) return DType::f32;
    return std::is_same_v<S, f16_t> ? DType::f16 : DType::bf16;
}

template <class E, class F, class S, class K = S, class W = S>
constexpr DtypeKernel dtype_kernel() {
    return {dtype_of<S>(),
            dtype_of<K>(),
            dtype_of<W>(),
            tile_shape<E>(),
            &flash_forward<E, F, S, K, W>,
            &flash_merge<E, S>,
            &flash_backward<E, S, K, W>};
}

// Register tiles of `rows` rows and `vectors` vectors; the FMA burst has as many accumulators as a tile.
template <class Isa, int rows, int vectors>
constexpr IsaKernels isa_table() {
    using F64 = FmaEngine<double, Isa, rows, vectors>;
    using F32 = FmaEngine<float, Isa, rows, vectors>;
    IsaKernels table;
    table.add(dtype_kernel<F64, F64, double>());
    table.add(dtype_kernel<F32, F32, float>());
    table.add(dtype_kernel<F32, F32, f16_t>());
    table.add(dtype_kernel<F32, F32, bf16_t>());
    table.fma_burst_f64 = &fma_burst<Vec<double, Isa>, rows * vectors>;
    table.fma_burst_f32 = &fma_burst<Vec<float, Isa>, rows * vectors>;
    return table;
}

}  // namespace
}  // namespace fastattn::cpu
