// The kernels as functions of the host. Nothing is waited for; errors of a launch are found by
// runtime::last_error().
#pragma once

#include "cuda/fused/decode/arguments.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

// `width` and `mt`: of a row of tiles.inc. The second puts together what the first leaves of several pieces.
int launch_decode(const DecodeArgs& args, int width, int mt, Stream stream);
void launch_merge_splits(const DecodeArgs& args, Stream stream);

}  // namespace fastattn::cuda
