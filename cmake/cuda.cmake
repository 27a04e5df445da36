# The CUDA room, csrc/cuda. FASTATTN_CUDA says what it holds:
#
#   AUTO      CUDA kernels where a working nvcc >= 12.0 is found, else none (the default; in somebody's project it is OFF,
#             as enabling CUDA writes to their cache)
#   ON        CUDA kernels for every architecture, or a configure error that says what is missing
#   OFF       none: no_cuda.cpp fills the symbols
#   EMULATED  for tests only: the CUDA kernels compiled as C++ and run on this machine's memory, tests/cuda_emulator
#
# nvcc is looked for in CMAKE_CUDA_COMPILER, CUDACXX, PATH, $CUDA_HOME, /usr/local/cuda and among the packages of the
# build's Python (`pip install 'fastattn[cuda-build]'`). What it is asked to do here is tried before CMake enables the
# language, whose checks end the configuration where they fail.
#
# Architectures: those of FASTATTN_CUDA_ARCHITECTURES. Where it is empty, AUTO takes the GPUs that are visible; with none
# it takes PTX that any GPU since Ampere compiles at its first use, and Hopper's own machine code, which PTX cannot give.
# The full list takes seven times as long to compile as the rest of the library: it is for ON, as wheels have it.
#
# This file sets
#   FASTATTN_CUDA_KIND   none, cuda or emulated
#   FASTATTN_CUDA_BUILD  one line for people: toolkit and architectures, or why there are no kernels
# and defines fastattn_add_cuda_room().

include(${CMAKE_CURRENT_LIST_DIR}/cuda_architectures.cmake)
set(FASTATTN_CUDA_ARCHITECTURES "" CACHE STRING
  "GPU architectures: 90-real is machine code, 90-virtual PTX; of plain numbers the newest gets both, the others the first; empty: by FASTATTN_CUDA")

string(TOUPPER "${FASTATTN_CUDA}" FASTATTN_CUDA_CHOICE)
if(NOT FASTATTN_CUDA_CHOICE MATCHES "^(AUTO|ON|OFF|EMULATED)$")
  message(FATAL_ERROR "FASTATTN_CUDA: expected AUTO, ON, OFF or EMULATED, got '${FASTATTN_CUDA}'")
endif()

# The folders `nvidia/cu13` of the Python that builds: NVIDIA's wheels put a toolkit there.
function(fastattn_find_cuda_wheels out)
  set(python "${Python_EXECUTABLE}")
  if(NOT python)
    find_program(FASTATTN_CUDA_PYTHON NAMES python3 python)
    mark_as_advanced(FASTATTN_CUDA_PYTHON)
    set(python "${FASTATTN_CUDA_PYTHON}")
  endif()
  set(found "")
  if(python)
    # sysconfig: in pip's build isolation sys.path leaves out the packages of the environment that is installed into.
    execute_process(COMMAND ${python} -c
      "import sys, sysconfig; print(*sys.path, *map(sysconfig.get_path, ('purelib', 'platlib')), sep=chr(59))"
      OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    foreach(folder IN LISTS folders)
      if(folder AND IS_DIRECTORY "${folder}/nvidia/cu13")
        list(APPEND found "${folder}/nvidia/cu13")
      endif()
    endforeach()
    list(REMOVE_DUPLICATES found)
  endif()
  set(${out} ${found} PARENT_SCOPE)
endfunction()

# The path of nvcc, or "" and `why`.
function(fastattn_find_nvcc out why)
  set(reason "nvcc was not found")
  unset(FASTATTN_NVCC_PROGRAM CACHE)
  if(CMAKE_CUDA_COMPILER)
    find_program(FASTATTN_NVCC_PROGRAM NAMES "${CMAKE_CUDA_COMPILER}")
    set(reason "CMAKE_CUDA_COMPILER is ${CMAKE_CUDA_COMPILER}, which is no program")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    find_program(FASTATTN_NVCC_PROGRAM NAMES "$ENV{CUDACXX}")
    set(reason "CUDACXX is $ENV{CUDACXX}, which is no program")
  else()
    find_program(FASTATTN_NVCC_PROGRAM NAMES nvcc)
    if(NOT FASTATTN_NVCC_PROGRAM)
      fastattn_find_cuda_wheels(wheels)
      find_program(FASTATTN_NVCC_PROGRAM NAMES nvcc NO_DEFAULT_PATH
        PATHS "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}" /usr/local/cuda ${wheels} PATH_SUFFIXES bin)
    endif()
  endif()
  set(${out} "" PARENT_SCOPE)
  set(${why} "${reason}" PARENT_SCOPE)
  if(FASTATTN_NVCC_PROGRAM)
    set(${out} "${FASTATTN_NVCC_PROGRAM}" PARENT_SCOPE)
    set(${why} "" PARENT_SCOPE)
  endif()
  unset(FASTATTN_NVCC_PROGRAM CACHE)
endfunction()

# Tries nvcc. Sets in the caller: _root (of the toolkit), _version, _architectures and where they come from (_remark), and
# _why where it cannot be used.
function(fastattn_try_nvcc nvcc)
  macro(give_up)
    string(REGEX REPLACE "[ \t\r\n]+" " " reason "${ARGN}")
    string(SUBSTRING "${reason}" 0 300 reason)
    set(_why "${reason}" PARENT_SCOPE)
    return()
  endmacro()
  set(_why "" PARENT_SCOPE)

  execute_process(COMMAND ${nvcc} --version RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed OR NOT output MATCHES "release [0-9.]+, V([0-9]+\\.[0-9]+\\.[0-9]+)")
    give_up("${nvcc} --version failed (${failed}): ${output}")
  endif()
  set(version "${CMAKE_MATCH_1}")
  set(_version "${version}" PARENT_SCOPE)
  if(version VERSION_LESS 12.0)
    give_up("${nvcc} is of CUDA ${version}; C++20 needs 12.0, and cuBLAS 13 is what the kernels call")
  endif()

  fastattn_choose_architectures(wanted remark)
  set(_remark "${remark}" PARENT_SCOPE)
  # An architecture that this nvcc does not know is left out, unless somebody asked for it.
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+[af]?" known "${known}")
  set(architectures "")
  set(newest "")
  foreach(entry IN LISTS wanted)
    if(NOT entry MATCHES "^(([0-9]+)[af]?)(-real|-virtual)?$")
      message(FATAL_ERROR "FASTATTN_CUDA_ARCHITECTURES: expected entries like 90, 90-real or 90-virtual, got '${entry}'")
    endif()
    set(name "${CMAKE_MATCH_1}")
    set(number "${CMAKE_MATCH_2}")
    set(kind "${CMAKE_MATCH_3}")
    if(number IN_LIST known)
      if(kind)
        list(APPEND architectures ${entry})
      else()
        list(APPEND architectures ${entry}-real)
        if(NOT newest OR number GREATER newest)
          set(newest ${number})
          set(newest_name ${name})
        endif()
      endif()
    elseif(FASTATTN_CUDA_ARCHITECTURES)
      give_up("nvcc ${version} does not know architecture ${name}")
    endif()
  endforeach()
  if(newest)
    list(APPEND architectures ${newest_name}-virtual)
  endif()
  if(NOT architectures)
    give_up("nvcc ${version} knows none of the architectures ${wanted}${remark}")
  endif()
  set(_architectures "${architectures}" PARENT_SCOPE)

  # nvcc may be a wrapper or a link somewhere else: only it knows where its toolkit is.
  set(probe ${PROJECT_BINARY_DIR}/cuda_probe)
  file(WRITE ${probe}/probe.cu "#include <cuda_runtime_api.h>\n#include <cuda_fp16.h>\n#include <concepts>\n"
    "template <std::integral T> __global__ void kernel(T* x) { *x = 0; }\n"
    "int main() { kernel<int><<<1, 1>>>(nullptr); return cudaDeviceSynchronize(); }\n")
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CUDA_FLAGS} ${CMAKE_CUDA_FLAGS_RELEASE} $ENV{CUDAFLAGS}")
  execute_process(COMMAND ${nvcc} ${flags} --dryrun -c ${probe}/probe.cu OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(output MATCHES "ftz=1|prec_div=0|prec_sqrt=0")
    message(FATAL_ERROR "fastattn: CUDAFLAGS, CMAKE_CUDA_FLAGS or NVCC_APPEND_FLAGS ask nvcc for fast math "
      "(-use_fast_math, -ftz, -prec-div or -prec-sqrt), and results would be wrong; leave it out, or build with "
      "FASTATTN_CUDA=OFF")
  endif()
  if(NOT output MATCHES "#\\$ TOP=([^\r\n]+)")
    give_up("${nvcc} --dryrun does not say where its toolkit is")
  endif()
  get_filename_component(root "${CMAKE_MATCH_1}" REALPATH)
  set(_root "${root}" PARENT_SCOPE)
  # NVIDIA's wheels have lib, where nvcc looks into lib64 only: its host compiler finds the libraries by this variable.
  # CMake's own checks need it too, a build does not: it links nothing with nvcc.
  if(NOT IS_DIRECTORY "${root}/lib64" AND EXISTS "${root}/lib/libcudart_static.a")
    set(ENV{LIBRARY_PATH} "${root}/lib:$ENV{LIBRARY_PATH}")
  endif()

  # All the way to a program, as CMake's checks go.
  list(GET architectures -1 last)
  string(REGEX REPLACE "-.*" "" last "${last}")
  execute_process(
    COMMAND ${nvcc} -std=c++20 -ccbin ${CMAKE_CUDA_HOST_COMPILER} -arch=compute_${last} -cudart static
      -o ${probe}/probe ${probe}/probe.cu
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    give_up("${nvcc} cannot build a program: ${output}")
  endif()
endfunction()

set(FASTATTN_CUDA_KIND none)
if(FASTATTN_CUDA_CHOICE STREQUAL "OFF")
  set(FASTATTN_CUDA_BUILD "FASTATTN_CUDA=OFF")
elseif(FASTATTN_CUDA_CHOICE STREQUAL "EMULATED")
  set(FASTATTN_CUDA_KIND emulated)
  set(FASTATTN_CUDA_BUILD "emulated GPU, for tests only")
else()
  # One host compiler for all: nvcc by itself takes the gcc of PATH.
  if(NOT CMAKE_CUDA_HOST_COMPILER)
    set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
    if(DEFINED ENV{CUDAHOSTCXX})
      set(CMAKE_CUDA_HOST_COMPILER "$ENV{CUDAHOSTCXX}")
    endif()
  endif()
  fastattn_find_nvcc(FASTATTN_NVCC _why)
  if(FASTATTN_NVCC AND CMAKE_VERSION VERSION_LESS 3.25)
    set(_why "CMake 3.25 or newer is needed for CUDA, this is ${CMAKE_VERSION}")
  elseif(FASTATTN_NVCC)
    fastattn_try_nvcc("${FASTATTN_NVCC}")
  endif()
  if(NOT _why)
    set(CMAKE_CUDA_COMPILER "${FASTATTN_NVCC}")
    set(CMAKE_CUDA_ARCHITECTURES ${_architectures})
    enable_language(CUDA)
    # CMake would add a cudart to whatever links our library; we name the file, which the package installs too.
    set(CMAKE_CUDA_RUNTIME_LIBRARY None)
    find_library(FASTATTN_CUDART_STATIC cudart_static NO_DEFAULT_PATH
      PATHS ${_root}/lib64 ${_root}/lib ${_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib
        ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES})
    mark_as_advanced(FASTATTN_CUDART_STATIC)
    if(NOT FASTATTN_CUDART_STATIC)
      set(_why "libcudart_static.a is not in the toolkit ${_root}")
    endif()
  endif()
  if(NOT _why)
    set(FASTATTN_CUDA_KIND cuda)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" FASTATTN_CUDA_BUILD "${_version}")
    set(FASTATTN_CUDA_BUILD "CUDA ${FASTATTN_CUDA_BUILD},")
    foreach(entry IN LISTS _architectures)
      string(REGEX REPLACE "^(.*)-real$" "sm_\\1" entry "${entry}")
      string(REGEX REPLACE "^(.*)-virtual$" "compute_\\1" entry "${entry}")
      string(APPEND FASTATTN_CUDA_BUILD " ${entry}")
    endforeach()
    string(APPEND FASTATTN_CUDA_BUILD "${_remark}")
    if(_remark)
      string(APPEND FASTATTN_CUDA_BUILD " (for more: -C cmake.define.FASTATTN_CUDA=ON)")
    endif()
  elseif(FASTATTN_CUDA_CHOICE STREQUAL "ON")
    message(FATAL_ERROR "FASTATTN_CUDA=ON: ${_why}")
  else()
    set(FASTATTN_CUDA_BUILD "${_why}")
  endif()
endif()
# It becomes a string of C++ by way of a shell: no quotes, no separators of CMake.
string(REGEX REPLACE "[^A-Za-z0-9 _.,:=+/()<>-]" "" FASTATTN_CUDA_BUILD "${FASTATTN_CUDA_BUILD}")

# For the emulated room and what includes its headers.
set(FASTATTN_EMULATOR_DEFINITIONS "")
if(FASTATTN_SANITIZE MATCHES "thread")
  # The threads of a block as threads of the machine: slow, and races of the kernels show.
  set(FASTATTN_EMULATOR_DEFINITIONS FASTATTN_EMULATOR_THREADS)
endif()

# An object library of what nvcc compiles, for the given architectures.
function(fastattn_add_device_objects target architectures)
  add_library(${target} OBJECT ${ARGN})
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${architectures}"
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  # -std here, as CMake 3.25 does not know that nvcc has C++20. --threads: architectures at once. --fmad=true, nvcc's
  # default, is wanted on the device.
  list(JOIN FASTATTN_IEEE_FLAGS "," ieee)
  target_compile_options(${target} PRIVATE -std=c++20 --threads=2
    -Xcompiler=${ieee},-Wall,-Wextra,-ffp-contract=off)
  if(FASTATTN_WERROR)
    target_compile_options(${target} PRIVATE -Werror=all-warnings -Xcompiler=-Werror)
  endif()
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/csrc/include)
endfunction()

# Object libraries with the room of a kind (none, cuda, emulated); sets <target>_OBJECTS in the caller. Once for each
# folder of the build: properties of source files, of which some here differ by kind, belong to a folder.
function(fastattn_add_cuda_room target kind build)
  set(room ${PROJECT_SOURCE_DIR}/csrc/cuda)
  set(emulator ${PROJECT_SOURCE_DIR}/tests/cuda_emulator)
  set(objects $<TARGET_OBJECTS:${target}>)
  if(kind STREQUAL "none")
    set(sources ${room}/no_cuda.cpp ${room}/host/build_info.cpp)
  else()
    file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${room}/*.cpp)
    list(REMOVE_ITEM sources ${room}/no_cuda.cpp)
  endif()
  if(kind STREQUAL "emulated")
    list(REMOVE_ITEM sources ${room}/host/runtime_cudart.cpp ${room}/blas/loader.cpp)
    file(GLOB_RECURSE device_sources CONFIGURE_DEPENDS ${room}/*.cu)
    list(APPEND sources ${emulator}/simt.cpp ${emulator}/runtime.cpp ${emulator}/cublas.cpp ${device_sources})
    set_source_files_properties(${device_sources} PROPERTIES LANGUAGE CXX)  # CMake says `-x c++` by itself
  endif()
  add_library(${target} OBJECT ${sources})
  fastattn_set_flags(${target})
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_SOURCE_DIR}/csrc/include)
  target_link_libraries(${target} PRIVATE Threads::Threads)
  set_source_files_properties(${room}/host/build_info.cpp PROPERTIES COMPILE_DEFINITIONS "FASTATTN_CUDA_BUILD=\"${build}\"")
  if(kind STREQUAL "emulated")
    target_include_directories(${target} PRIVATE ${emulator})
    target_compile_definitions(${target} PRIVATE ${FASTATTN_EMULATOR_DEFINITIONS} FASTATTN_HAS_SM90A=1)
  elseif(kind STREQUAL "cuda")
    # SYSTEM: NVIDIA's headers are not ours to keep free of warnings.
    target_include_directories(${target} SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    # 90a is for the kernel that needs it, where other code runs on Hopper without.
    set(plain ${CMAKE_CUDA_ARCHITECTURES})
    list(FILTER plain EXCLUDE REGEX "[0-9]a-real$")
    if(NOT plain)
      set(plain ${CMAKE_CUDA_ARCHITECTURES})
    endif()
    fastattn_add_device_objects(${target}_device "${plain}" ${room}/simt/launch.cu
      ${room}/simt/launch_backward.cu)
    # Tensor cores as of Ampere. Code for sm_80 runs on 8.6 and 8.9 as it is; the kernel refuses what is older, and traps there.
    set(tensor ${plain})
    list(FILTER tensor EXCLUDE REGEX "^7[0-9]")
    if("80-real" IN_LIST tensor)
      list(REMOVE_ITEM tensor 86-real 89-real)
    endif()
    if(NOT tensor)
      set(tensor ${plain})
    endif()
    fastattn_add_device_objects(${target}_tensor "${tensor}" ${room}/fused/decode/launch.cu
      ${room}/fused/sm80/launch.cu)
    # Hopper's own instructions are in 9.0a alone, which no other architecture runs. Without 9.0 the code is empty, and the kernel
    # refuses every device.
    set(hopper ${CMAKE_CUDA_ARCHITECTURES})
    list(FILTER hopper INCLUDE REGEX "^90")
    if(hopper)
      set(hopper 90a-real)
      target_compile_definitions(${target} PRIVATE FASTATTN_HAS_SM90A=1)
    else()
      list(GET tensor 0 hopper)
    endif()
    fastattn_add_device_objects(${target}_hopper "${hopper}" ${room}/fused/sm90/launch.cu)
    list(APPEND objects $<TARGET_OBJECTS:${target}_device> $<TARGET_OBJECTS:${target}_tensor>
      $<TARGET_OBJECTS:${target}_hopper>)
  endif()
  set(${target}_OBJECTS ${objects} PARENT_SCOPE)
endfunction()
