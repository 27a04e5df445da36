#include "cuda/errors.h"

#include <string>

#include <fastattn/attention.h>

#include "cuda/runtime.h"

namespace fastattn::cuda {
namespace {

// After these the context answers every call with the same error (driver_types.h: faults of kernels, hardware).
bool is_sticky(int code) noexcept { return code == 214 || code == 220 || (code >= 700 && code < 720); }

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

void throw_on_status(const cublas::Table& table, cublas::Status status, const char* attempted) {
    if (status == cublas::kSuccess) return;
    if (status == cublas::kAllocFailed) throw OutOfMemory(attempted, 0);
    throw CudaError(std::string("cuBLAS: ") + attempted + " failed: " + table.GetStatusName(status), false);
}

}  // namespace fastattn::cuda
