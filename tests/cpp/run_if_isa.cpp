// run_if_isa <isa> <program>: runs the program where the CPU has the instruction set, else exits with 77
// (CTest: skipped). A test compiled for AVX-512 cannot do this itself: it may die before main().
#include <unistd.h>
#include <cstdio>
#include <cstring>

namespace {

bool has(const char* isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (std::strcmp(isa, "avx2") == 0) return avx2;
    if (std::strcmp(isa, "avx512") == 0) return avx512;
    if (std::strcmp(isa, "avx512bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#else
    (void)isa;
#endif
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: run_if_isa <isa> <program> [arguments]\n");
        return 2;
    }
    if (!has(argv[1])) {
        std::printf("skipped: this CPU has no %s\n", argv[1]);
        return 77;
    }
    execv(argv[2], argv + 2);
    std::perror(argv[2]);
    return 1;
}
