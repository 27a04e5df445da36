// The kernel as a function of the host. Nothing is waited for; errors of a launch are found by
// runtime::last_error().
#pragma once

#include "cuda/fused/arguments.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

// `width`: of a row of tiles.inc. Returns an error code where the tile's shared memory cannot be had.
int launch_flash_sm80(const FlashArgs& args, int width, Stream stream);

}  // namespace fastattn::cuda
