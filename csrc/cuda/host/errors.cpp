#include "cuda/host/errors.h"

#include <algorithm>
#include <iterator>
#include <string>

#include <fastattn/attention.h>

#include "cuda/simt/runtime.h"

namespace fastattn::cuda {
namespace {

// After these the context answers every call with the same error. Of them driver_types.h says that the
// process must be terminated: uncorrectable ECC and NVLink errors, contained errors, faults of kernels,
// launches that time out or fail.
bool is_sticky(int code) noexcept {
    constexpr int codes[] = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721};
    return std::find(std::begin(codes), std::end(codes), code) != std::end(codes);
}

}  // namespace

void throw_on_error(int code, const char* attempted, std::size_t bytes) {
    if (code == 0) return;
    if (code == kNoMemory) throw OutOfMemory(attempted, bytes);
    std::string text = std::string("CUDA: ") + attempted + " failed: " + runtime::error_name(code) + " (" +
                       runtime::error_text(code) + ")";
    const bool sticky = is_sticky(code);
    if (sticky) text += "; CUDA cannot be used any more in this process, which must restart";
    throw CudaError(text, sticky);
}

}  // namespace fastattn::cuda
