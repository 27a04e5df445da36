// measure_fma_peak and measure_read_bandwidth for `python -m fastattn bench`.
#include <pybind11/pybind11.h>

#include <string>

#include <fastattn/attention.h>
#include <fastattn/limits.h>

#include "bindings/gil.h"

namespace fastattn::bindings {

namespace py = pybind11;

namespace {

DType float_dtype(const std::string& name) {
    for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
        if (name == dtype_name(dtype)) return dtype;
    throw ValueError("dtype: expected 'float64', 'float32', 'float16' or 'bfloat16', got '" + name + "'");
}

}  // namespace

void register_limits(py::module_& module) {
    module.def(
        "measure_fma_peak",
        [](const std::string& kernel, const std::string& dtype, int threads, double seconds) {
            const DType type = float_dtype(dtype);
            return without_gil([&] { return measure_fma_peak(kernel, type, threads, seconds); });
        },
        py::arg("kernel"), py::arg("dtype"), py::arg("threads"), py::arg("seconds") = 0.2,
        "FLOP/s of this kernel's multiply-adds in registers.");
    module.def(
        "measure_read_bandwidth",
        [](std::size_t bytes, int threads, double seconds) {
            return without_gil([&] { return measure_read_bandwidth(bytes, threads, seconds); });
        },
        py::arg("bytes"), py::arg("threads"), py::arg("seconds") = 0.3,
        "Bytes/s at which all threads together read `bytes` bytes, each its own part.");
}

}  // namespace fastattn::bindings
