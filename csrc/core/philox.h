// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
// Dropout keeps weight (b,h,i,j) when word j%4 of philox(counter = {j/4, i, h, b}, key = seed) is at
// least floor(p * 2^32); so every kernel and device draws the same mask.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace fastattn {
namespace {

struct PhiloxBlock {
    std::uint32_t word[4];
};

FASTATTN_HOST_DEVICE inline PhiloxBlock philox4x32(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                                                   std::uint32_t c3, std::uint64_t seed) noexcept {
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
        const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
        const auto hi0 = static_cast<std::uint32_t>(p0 >> 32), hi1 = static_cast<std::uint32_t>(p1 >> 32);
        c0 = hi1 ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(p1);
        c2 = hi0 ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

FASTATTN_HOST_DEVICE inline std::uint32_t dropout_threshold(double p) noexcept {
    return static_cast<std::uint32_t>(p * 4294967296.0);
}

}  // namespace
}  // namespace fastattn
