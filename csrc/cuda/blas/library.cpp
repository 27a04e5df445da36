#include "cuda/blas/library.h"

#include <algorithm>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <fastattn/attention.h>

namespace fastattn::cuda::cublas {
namespace {

struct Library {
    std::mutex mutex;
    const Table* table = nullptr;
    std::list<std::string> reasons;  // every one that was ever said: it stays readable
    std::vector<std::pair<int, std::unique_ptr<GemmPlans>>> plans;  // by device
};

// Never destroyed: the driver may be gone before static destructors run.
Library& library() {
    static auto* const the_library = new Library;
    return *the_library;
}

// Under the mutex.
const char* find(Library& lib) {
    if (lib.table != nullptr) return nullptr;
    const char* why = nullptr;
    lib.table = open(&why);
    if (lib.table != nullptr) return nullptr;
    const auto known = std::find(lib.reasons.begin(), lib.reasons.end(), why);
    return known != lib.reasons.end() ? known->c_str() : lib.reasons.emplace_back(why).c_str();
}

}  // namespace

const char* missing() noexcept {
    Library& lib = library();
    const std::lock_guard lock(lib.mutex);
    return find(lib);
}

bool is_open() noexcept {
    Library& lib = library();
    const std::lock_guard lock(lib.mutex);
    return lib.table != nullptr;
}

GemmPlans& plans_of(const DeviceContext& device) {
    Library& lib = library();
    const std::lock_guard lock(lib.mutex);
    for (const auto& [index, plans] : lib.plans)
        if (index == device.index) return *plans;
    if (const char* why = find(lib)) throw_unavailable(why);
    const CurrentDevice current(device.index);
    Handle handle = nullptr;
    throw_on_status(*lib.table, lib.table->Create(&handle), "starting the library");
    lib.plans.emplace_back(device.index,
                           std::make_unique<GemmPlans>(*lib.table, handle, kGemmWorkspaceBytes));
    return *lib.plans.back().second;
}

}  // namespace fastattn::cuda::cublas
