# The extension module fastattn._core. It is installed as component "python", which is all that a wheel holds.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
set(FASTATTN_PYBIND11_DIR "")
if(NOT pybind11_DIR)
  # Outside scikit-build-core nobody tells CMake where pip put pybind11.
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE FASTATTN_PYBIND11_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE FASTATTN_PYBIND11_FAILED)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 3.0 CONFIG REQUIRED HINTS "${FASTATTN_PYBIND11_DIR}")

file(GLOB FASTATTN_BINDING_SOURCES CONFIGURE_DEPENDS csrc/bindings/*.cpp)
# NO_EXTRAS: no link-time optimisation; it would buy nothing, the hot code is in the ISA objects.
pybind11_add_module(_core MODULE NO_EXTRAS ${FASTATTN_BINDING_SOURCES})
fastattn_set_flags(_core)
target_include_directories(_core PRIVATE csrc)
# pybind11 takes seven of the eight seconds of each binding file: two batches, one for each of two CPUs, have it twice.
# A precompiled header saves its parsing alone, and ccache keeps nothing that was compiled with one.
set_target_properties(_core PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 6)
target_compile_definitions(_core PRIVATE FASTATTN_VERSION="${PROJECT_VERSION}")
target_link_libraries(_core PRIVATE fastattn)
# EXCLUDE_FROM_ALL: a plain `cmake --install` is for C++ users.
install(TARGETS _core LIBRARY DESTINATION fastattn COMPONENT python EXCLUDE_FROM_ALL)
