#include "cpu/cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FASTATTN_X86_64 1
#include <cstdint>
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace fastattn {

#if defined(FASTATTN_X86_64)

namespace {

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros for a leaf that this CPU does not have.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) noexcept {
    Registers r;
#if defined(_MSC_VER)
    int out[4];
    __cpuid(out, static_cast<int>(leaf & 0x80000000u));
    if (static_cast<std::uint32_t>(out[0]) < leaf) return r;
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
    r = {static_cast<std::uint32_t>(out[0]), static_cast<std::uint32_t>(out[1]),
         static_cast<std::uint32_t>(out[2]), static_cast<std::uint32_t>(out[3])};
#else
    if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
#endif
    return r;
}

// Which register files the operating system saves (XCR0). Call only where OSXSAVE is set.
std::uint64_t saved_state() noexcept {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (std::uint64_t{high} << 32) | low;
#endif
}

constexpr bool bit(std::uint32_t word, int n) noexcept { return ((word >> n) & 1u) != 0; }

struct Missing {
    const char* avx2 = nullptr;
    const char* avx512 = nullptr;
    const char* avx512bf16 = nullptr;
};

Missing detect() noexcept {
    const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
    const bool osxsave = bit(leaf1.ecx, 27);
    const std::uint64_t saved = osxsave ? saved_state() : 0;
    const bool ymm_saved = (saved & 0x6u) == 0x6u, zmm_saved = (saved & 0xE6u) == 0xE6u;

    Missing m;
    if (!bit(leaf7.ebx, 5))
        m.avx2 = "this CPU lacks AVX2";
    else if (!bit(leaf1.ecx, 12))
        m.avx2 = "this CPU lacks FMA";
    else if (!bit(leaf1.ecx, 29))
        m.avx2 = "this CPU lacks F16C";
    else if (!ymm_saved)
        m.avx2 = "the operating system does not enable AVX registers";

    if (m.avx2 != nullptr)
        m.avx512 = m.avx2;
    else if (!bit(leaf7.ebx, 16))
        m.avx512 = "this CPU lacks AVX-512";
    else if (!bit(leaf7.ebx, 30) || !bit(leaf7.ebx, 17) || !bit(leaf7.ebx, 31))
        m.avx512 = "this CPU lacks AVX-512 BW, DQ or VL";
    else if (!zmm_saved)
        m.avx512 = "the operating system does not enable AVX-512 registers";

    if (m.avx512 != nullptr)
        m.avx512bf16 = m.avx512;
    else if (!bit(leaf7_1.eax, 5))
        m.avx512bf16 = "this CPU lacks AVX-512 BF16";
    return m;
}

// At load time: the guard of a function's static could be held by another thread during a fork.
const Missing missing = detect();

}  // namespace

const char* missing_avx2() noexcept { return missing.avx2; }
const char* missing_avx512() noexcept { return missing.avx512; }
const char* missing_avx512bf16() noexcept { return missing.avx512bf16; }
const char* missing_neon() noexcept { return "built for x86-64"; }

#else

namespace {
#if defined(__aarch64__) || defined(_M_ARM64)
constexpr const char* kBuiltFor = "built for aarch64";
constexpr const char* kNoNeon = nullptr;
#else
constexpr const char* kBuiltFor = "built for another architecture";
constexpr const char* kNoNeon = kBuiltFor;
#endif
}  // namespace

const char* missing_avx2() noexcept { return kBuiltFor; }
const char* missing_avx512() noexcept { return kBuiltFor; }
const char* missing_avx512bf16() noexcept { return kBuiltFor; }
const char* missing_neon() noexcept { return kNoNeon; }

#endif

}  // namespace fastattn
