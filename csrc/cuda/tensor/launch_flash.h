// The fused kernels as functions of the host. Nothing is waited for; errors of a launch are found by runtime::last_error().
#pragma once

#include "cuda/runtime.h"
#include "cuda/tensor/decode_arguments.h"
#include "cuda/tensor/flash_arguments.h"
#include "cuda/tensor/flash_sm90_arguments.h"

namespace fastattn::cuda {

// `width`: of a row of flash_sm80_tiles.inc. Returns an error code where the tile's shared memory cannot be had.
int launch_flash_sm80(const FlashArgs& args, int width, Stream stream);
// `tile`: the number of a row of flash_sm90_tiles.inc, whose sizes `args` is for; as many blocks of threads as there are
// multiprocessors.
int launch_flash_sm90(const HopperArgs& args, int tile, int blocks, Stream stream);
// `width` and `mt`: of a row of decode_tiles.inc. The second puts together what the first leaves of several pieces.
int launch_decode(const DecodeArgs& args, int width, int mt, Stream stream);
void launch_merge_splits(const DecodeArgs& args, Stream stream);
void launch_recompute(const FlashArgs& args, Stream stream);

}  // namespace fastattn::cuda
