// The SIMT kernels of the backward pass as functions of the host, like those of launch.h. What has nothing to
// do is not launched.
#pragma once

#include "cuda/simt/arguments.h"
#include "cuda/simt/runtime.h"

namespace fastattn::cuda {

void launch_row_states(const BackwardArgs& args, Stream stream);  // of the region
void launch_score_gradients(const BackwardArgs& args, Stream stream);
void launch_row_units(const BackwardArgs& args, Stream stream);  // float16 only, as the next two
void launch_scale_rows(const BackwardArgs& args, Stream stream);
void launch_add_keys(const BackwardArgs& args, Stream stream);
void launch_repair(const BackwardArgs& args, Stream stream);
void launch_bias_sums(const BackwardArgs& args, Stream stream);
void launch_head_sums(const BackwardArgs& args, Stream stream);  // of the region
void launch_clean(const CleanArgs& args, Stream stream);
void launch_any_bad(const AnyArgs& args, Stream stream);
void launch_store(const StoreArgs& args, Stream stream);
void launch_store_bias(const StoreBiasArgs& args, Stream stream);
void launch_store_heads(const StoreHeadsArgs& args, Stream stream);
void launch_zero(const ZeroArgs& args, Stream stream);

}  // namespace fastattn::cuda
