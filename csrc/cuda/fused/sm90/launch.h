// The kernel as a function of the host. Nothing is waited for; errors of a launch are found by
// runtime::last_error().
#pragma once

#include "cuda/fused/sm90/arguments.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

// `tile`: the number of a row of tiles.inc, whose sizes `args` is for; as many blocks of threads as there are
// multiprocessors. Returns an error code where the tile's shared memory cannot be had.
int launch_flash_sm90(const HopperArgs& args, int tile, int blocks, Stream stream);

}  // namespace fastattn::cuda
