// cpu-avx512bf16: bf16 products two at a time (vdpbf16ps). Only decode's values are widened to f32, as in
// cpu-avx512, where one row takes them or Dv is no multiple of 32.
#include "cpu/flash/engine_bf16.h"
#include "cpu/isa_table.h"

namespace fastattn::cpu {
namespace {

struct Bf16DotChain {
    using Acc = __m512;
    using In = __m512bh;
    static constexpr int kFlops = 64;

    static In broadcast(float x) { return _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(x)); }
    static Acc start(float x) { return _mm512_set1_ps(x); }
    static Acc step(In a, In b, Acc acc) { return _mm512_dpbf16_ps(acc, a, b); }
    static double sum(Acc acc) { return double(_mm512_reduce_add_ps(acc)); }
};

constexpr IsaKernels make_table() {
    IsaKernels table;
    table.add(dtype_kernel<Bf16DotEngine, FmaEngine<float, Avx512, 6, 4>, bf16_t>());
    table.fma_burst_bf16 = &chain_burst<Bf16DotChain, 24>;
    return table;
}

}  // namespace

const IsaKernels& avx512bf16_kernels() {
    static constexpr IsaKernels table = make_table();
    return table;
}

}  // namespace fastattn::cpu
