// Opens libcublasLt when it is first used: a copy that the process has already, the one that was offered,
// what the system finds. It is never linked, so that the same build works where there is none.
#include <dlfcn.h>

#include <mutex>
#include <string>

#include "cuda/blas/abi.h"

namespace fastattn::cuda::cublas {
namespace {

// A major version is an ABI; the structs of abi.h are those of 13.
constexpr const char* kLibrary = "libcublasLt.so.13";
constexpr std::size_t kOldestVersion = 130000;

struct Library {
    std::mutex mutex;
    bool found = false;
    std::string offered, reason;
    Table table{};
};

// Never destroyed: calls may come until the process ends.
Library& library() {
    static auto* const the_library = new Library;
    return *the_library;
}

template <class Function>
bool load(void* handle, const char* name, Function& function) {
    void* const address = dlsym(handle, (std::string("cublasLt") + name).c_str());
    function = reinterpret_cast<Function>(address);
    return address != nullptr;
}

bool load_table(void* handle, Table& table) {
#define FASTATTN_LOAD(name) load(handle, #name, table.name)
    return FASTATTN_LOAD(GetVersion) && FASTATTN_LOAD(GetStatusName) && FASTATTN_LOAD(Create) &&
           FASTATTN_LOAD(MatmulDescCreate) && FASTATTN_LOAD(MatmulDescDestroy) &&
           FASTATTN_LOAD(MatmulDescSetAttribute) && FASTATTN_LOAD(MatrixLayoutCreate) &&
           FASTATTN_LOAD(MatrixLayoutDestroy) && FASTATTN_LOAD(MatrixLayoutSetAttribute) &&
           FASTATTN_LOAD(MatmulPreferenceCreate) && FASTATTN_LOAD(MatmulPreferenceDestroy) &&
           FASTATTN_LOAD(MatmulPreferenceSetAttribute) && FASTATTN_LOAD(MatmulAlgoGetHeuristic) &&
           FASTATTN_LOAD(Matmul);
#undef FASTATTN_LOAD
}

void* open_library(Library& lib) {
    if (void* loaded = dlopen(kLibrary, RTLD_LAZY | RTLD_NOLOAD)) return loaded;
    if (!lib.offered.empty())
        if (void* offered = dlopen(lib.offered.c_str(), RTLD_LAZY | RTLD_LOCAL)) return offered;
    return dlopen(kLibrary, RTLD_LAZY | RTLD_LOCAL);
}

}  // namespace

const Table* open(const char** why) noexcept {
    Library& lib = library();
    const std::lock_guard lock(lib.mutex);
    if (lib.found) return &lib.table;
    void* const handle = open_library(lib);
    if (handle == nullptr) {
        const char* text = dlerror();
        lib.reason =
            std::string("cuBLAS 13 was not found; pip install \"fastattn[cuda]\" (the loader says: ") +
            (text == nullptr ? "nothing" : text) + ")";
    } else if (!load_table(handle, lib.table)) {
        lib.reason = std::string(kLibrary) + " lacks a function that fastattn needs";
    } else if (lib.table.GetVersion() < kOldestVersion) {
        lib.reason = "cuBLAS 13.0 or newer is needed, " + std::string(kLibrary) + " is version " +
                     std::to_string(lib.table.GetVersion());
    } else {
        lib.found = true;
        return &lib.table;
    }
    *why = lib.reason.c_str();
    return nullptr;
}

void offer(const char* path) {
    Library& lib = library();
    const std::lock_guard lock(lib.mutex);
    if (!lib.found) lib.offered = path;
}

}  // namespace fastattn::cuda::cublas
