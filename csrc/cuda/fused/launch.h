// What the fused kernels share, as a function of the host. Nothing is waited for; errors of a launch are
// found by runtime::last_error().
#pragma once

#include "cuda/fused/arguments.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

void launch_recompute(const FlashArgs& args, Stream stream);

}  // namespace fastattn::cuda
