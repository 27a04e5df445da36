// The FMA peak of one instruction set: `Chains` independent accumulators, each acc = a * b + acc, in
// registers only. There must be more chains than latency x ports (4 x 2 on today's cores) and no more
// than the register file holds with the two operands: 24 of 32 registers, 12 of 16.
//
// Instantiated in the isa_*.cpp files, so no standard containers and internal linkage throughout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastattn::cpu {
namespace {

// One multiply-add over a vector V of the simd/vec.h contract: 2 FLOPs per lane.
template <class V>
struct FmaChain {
    using Acc = V;
    using In = V;
    static constexpr int kFlops = 2 * V::width;

    static In broadcast(float x) { return V::set1(static_cast<typename V::value_type>(x)); }
    static Acc start(float x) { return broadcast(x); }
    static Acc step(In a, In b, Acc acc) { return V::fma(a, b, acc); }
    static double sum(Acc acc) {
        typename V::value_type lane[V::width];
        acc.store(lane);
        double total = 0.0;
        for (const auto x : lane) total += static_cast<double>(x);
        return total;
    }
};

template <class Chain, std::size_t... I>
inline void burst_step(typename Chain::Acc (&acc)[sizeof...(I)], typename Chain::In a, typename Chain::In b,
                       std::index_sequence<I...>) {
    ((acc[I] = Chain::step(a, b, acc[I])), ...);
}

// Runs `iterations` rounds over all chains and returns the FLOPs done. Chain is FmaChain<V>, or a struct
// of the same form for instructions outside the contract; for bfloat16 dot products:
//   using Acc = __m512; using In = __m512bh; kFlops = 64; broadcast(x) both elements of every pair;
//   step = _mm512_dpbf16_ps(acc, a, b).
template <class Chain, int Chains>
double chain_burst(std::int64_t iterations) {
    // Read at run time, so that no product is folded; different starts, so that no two chains are merged.
    // The sums stay finite and normal for any number of iterations.
    volatile float left = 1.0f, right = 0x1p-20f, first = 1.0f;
    typename Chain::Acc acc[Chains];
    for (int i = 0; i < Chains; ++i) acc[i] = Chain::start(first + static_cast<float>(i));
    const typename Chain::In a = Chain::broadcast(left), b = Chain::broadcast(right);
    for (std::int64_t n = 0; n < iterations; ++n)
        burst_step<Chain>(acc, a, b, std::make_index_sequence<Chains>{});
    double total = 0.0;
    for (int i = 0; i < Chains; ++i) total += Chain::sum(acc[i]);
    // Always true; it ties the FLOPs to the arithmetic, which thus cannot be left out.
    return total > 0.0 ? 1.0 * Chain::kFlops * Chains * static_cast<double>(iterations) : 0.0;
}

template <class V, int Chains = 24>
double fma_burst(std::int64_t iterations) {
    return chain_burst<FmaChain<V>, Chains>(iterations);
}

}  // namespace
}  // namespace fastattn::cpu
