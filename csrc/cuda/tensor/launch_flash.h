// The fused kernels as functions of the host. Nothing is waited for; errors of a launch are found by runtime::last_error().
#pragma once

#include "cuda/runtime.h"
#include "cuda/tensor/flash_arguments.h"
#include "cuda/tensor/flash_sm90_arguments.h"

namespace fastattn::cuda {

// `width`: of a row of flash_sm80_tiles.inc. Returns an error code where the tile's shared memory cannot be had.
int launch_flash_sm80(const FlashArgs& args, int width, Stream stream);
// `tile`: the number of a row of flash_sm90_tiles.inc, whose sizes `args` is for; as many blocks of threads as there are
// multiprocessors.
int launch_flash_sm90(const HopperArgs& args, int tile, int blocks, Stream stream);
void launch_recompute(const FlashArgs& args, Stream stream);

}  // namespace fastattn::cuda
