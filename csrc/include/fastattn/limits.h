// What this machine can do at most, to set a measured speed against: arithmetic in registers and reads
// of memory. Both are measured when called, so that limit and figure come from the same minute.
#pragma once

#include <cstddef>
#include <string_view>

#include <fastattn/tensor_view.h>

namespace fastattn {

// FLOP/s (a multiply-add counts two) that the instructions of `kernel` reach on `threads` threads with
// operands of `dtype` and nothing but registers: the best of many short windows within `seconds`.
// float16 is computed in float32, bfloat16 too where the kernel has no bfloat16 dot products.
// Throws ValueError for an unknown kernel, dtype, threads < 1 or seconds <= 0, UnsupportedError for a
// kernel that cannot run here.
double measure_fma_peak(std::string_view kernel, DType dtype, int threads, double seconds);

// Bytes per second at which `threads` threads together read `bytes` bytes, again and again, each its own
// part: from DRAM with 256 MiB, from a shared cache with a few MiB. Huge pages where the system grants
// them, as NumPy asks for them too. Throws ValueError and OutOfMemory.
double measure_read_bandwidth(std::size_t bytes, int threads, double seconds);

}  // namespace fastattn
