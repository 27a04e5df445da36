// The SIMT kernels as functions of the host: grids and blocks are chosen here, nothing is waited for. Errors
// of a launch are found by runtime::last_error().
#pragma once

#include "cuda/simt/arguments.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

void launch_softmax(const SoftmaxArgs& args, Stream stream);
void launch_restore(const SoftmaxArgs& args, Stream stream);
void launch_copy(const CopyArgs& args, Stream stream);
void launch_pointers(const PointerArgs& args, Stream stream);

}  // namespace fastattn::cuda
