// What this machine can run: the CPU's instruction sets, and whether the operating system saves their
// registers. Each function says nullptr when the set can be used, else the reason why not.
#pragma once

namespace fastattn {

const char* missing_avx2() noexcept;        // AVX2, FMA, F16C
const char* missing_avx512() noexcept;      // AVX-512 F, BW, DQ, VL, on top of the above
const char* missing_avx512bf16() noexcept;  // AVX512_BF16, on top of the above
const char* missing_neon() noexcept;        // Advanced SIMD, part of every AArch64 CPU

}  // namespace fastattn
