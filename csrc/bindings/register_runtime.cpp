// Kernels, threads, version, CPU features. (threadpoolctl talks to C symbols of threads/thread_pool.cpp.)
#include <algorithm>
#include <iterator>
#include <limits>
#include <string>

#include <fastattn/attention.h>

#include "bindings/cuda_use.h"
#include "bindings/register.h"
#include "core/cuda_room.h"
#include "core/device_choice.h"
#include "cpu/cpu_features.h"

namespace fastattn::bindings {
namespace {

// One row per kernel; fastattn._attention makes KernelInfo of it.
py::list kernel_rows() {
    const StaysIfLeaving stays;
    prepare_cuda();
    py::list rows;
    for (const KernelInfo& kernel : kernels()) {
        py::tuple dtypes(kernel.dtypes.size());
        for (std::size_t i = 0; i < kernel.dtypes.size(); ++i) {
            dtypes[i] = dtype_name(kernel.dtypes[i]);
        }
        rows.append(py::make_tuple(kernel.name, kernel.device, dtypes, kernel.usable, kernel.reason));
    }
    return rows;
}

void set_threads(const py::object& n) {
    if (!PyIndex_Check(n.ptr()) || py::isinstance<py::bool_>(n)) {
        throw py::type_error("n: expected an int, got " + std::string(Py_TYPE(n.ptr())->tp_name));
    }
    const PyRef index = PyRef::steal(PyNumber_Index(n.ptr()));
    if (!index) {
        throw py::error_already_set();
    }
    int overflow = 0;
    const long value = PyLong_AsLongAndOverflow(index.get(), &overflow);
    if (overflow != 0 || value < 1 || value > std::numeric_limits<int>::max()) {
        throw py::value_error("n: expected an int from 1 to 2**31 - 1, got " +
                              py::repr(py::handle(index.get())).cast<std::string>());
    }
    set_num_threads(static_cast<int>(value));
}

// Name of an instruction set -> None when this machine has it, else the reason.
py::dict cpu_features() {
    py::dict features;
    const auto add = [&](const char* name, const char* missing) {
        features[name] = missing == nullptr ? py::object(py::none()) : py::object(py::str(missing));
    };
    add("avx2", missing_avx2());
    add("avx512", missing_avx512());
    add("avx512bf16", missing_avx512bf16());
    add("neon", missing_neon());
    return features;
}

// Every speed of DeviceSpeeds with its name.
struct Speed {
    const char* name;
    double DeviceSpeeds::* value;
};
constexpr Speed kSpeeds[] = {
    {"cpu_per_thread_f64", &DeviceSpeeds::cpu_per_thread_f64},
    {"cpu_per_thread_f32", &DeviceSpeeds::cpu_per_thread_f32},
    {"cpu_per_thread_bf16", &DeviceSpeeds::cpu_per_thread_bf16},
    {"gpu_f64", &DeviceSpeeds::gpu_f64},
    {"gpu_f32", &DeviceSpeeds::gpu_f32},
    {"gpu_half", &DeviceSpeeds::gpu_half},
    {"to_device", &DeviceSpeeds::to_device},
    {"to_host", &DeviceSpeeds::to_host},
    {"cpu_seconds", &DeviceSpeeds::cpu_seconds},
    {"gpu_seconds", &DeviceSpeeds::gpu_seconds},
};

py::dict speeds_dict() {
    const DeviceSpeeds speeds = device_speeds();
    py::dict result;
    for (const Speed& speed : kSpeeds) {
        result[speed.name] = speeds.*speed.value;
    }
    return result;
}

void set_speeds(const py::kwargs& changes) {
    DeviceSpeeds speeds = device_speeds();
    for (const auto& [key, value] : changes) {
        const auto name = key.cast<std::string>();
        const auto* known = std::find_if(std::begin(kSpeeds), std::end(kSpeeds),
                                         [&](const Speed& speed) { return name == speed.name; });
        if (known == std::end(kSpeeds)) {
            throw py::type_error("speeds: there is none named '" + name + "'");
        }
        speeds.*known->value = value.cast<double>();
    }
    set_device_speeds(speeds);
}

std::string build_info() {
#if defined(__clang__)
    const std::string compiler = "Clang " __clang_version__;
#elif defined(__GNUC__)
    const std::string compiler = "GCC " __VERSION__;
#else
    const std::string compiler = "an unknown compiler";
#endif
#if defined(NDEBUG)
    return compiler;
#else
    return compiler + ", with assertions";
#endif
}

}  // namespace

void register_runtime(py::module_& m) {
    py::options options;
    options.disable_function_signatures();  // the docstrings carry them, where inspect finds them
    m.attr("__version__") = version();
    m.def("kernel_rows", &kernel_rows,
          "kernel_rows()\n--\n\n(name, device, dtypes, usable, reason) of each kernel.");
    m.def("cpu_features", &cpu_features,
          "cpu_features()\n--\n\nInstruction set -> None where this machine has it, else why not.");
    m.def("build_info", &build_info, "build_info()\n--\n\nThe compiler that made this module.");
    m.def("cuda_build", &cuda_build,
          "cuda_build()\n--\n\nToolkit and architectures of the CUDA kernels, or why this build has none.");
    m.def("device_speeds", &speeds_dict,
          "device_speeds()\n--\n\nThe speeds by which a call on host arrays chooses a device, by name.");
    m.def("set_device_speeds", &set_speeds,
          "set_device_speeds(**speeds)\n--\n\nChange some of `device_speeds`: FLOP/s, bytes/s and seconds.");
    m.def("get_num_threads", &get_num_threads, R"doc(get_num_threads()
--

The number of CPU threads that a call may use, the calling one included.

Returns
-------
int
    What `set_num_threads` set last; before that FASTATTN_NUM_THREADS, else the first number of
    OMP_NUM_THREADS (what OpenMP would ignore is ignored), else the CPUs that this process may use
    (affinity and cgroup quota). The variables are read at the first use.
)doc");
    m.def("set_num_threads", &set_threads, py::arg("n"), R"doc(set_num_threads(n)
--

Set the number of CPU threads of the calls that follow, in all Python threads.

Results do not depend on it. `threadpoolctl.threadpool_limits` works too.

Parameters
----------
n : int
    At least 1.

Raises
------
TypeError
    n is not an int.
ValueError
    n is below 1.
)doc");
}

}  // namespace fastattn::bindings
