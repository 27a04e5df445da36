# One object library per instruction set, so that code of one set can never leak into the objects that
# must run everywhere (tests/cpp/check_isa_symbols.cmake proves it).
#
#   FASTATTN_ISA_OBJECTS      what the static library links
#   FASTATTN_ISA_DEFINITIONS  FASTATTN_HAVE_<ISA>=1 for each set in this build; cpu_kernels.cpp lists the
#                             others as unusable
#   FASTATTN_ISAS             names of the sets in this build
#   FASTATTN_ISA_FLAGS_<isa>  its compiler flags (the C++ tests of that set use them too)

set(FASTATTN_ISA_OBJECTS "")
set(FASTATTN_ISA_DEFINITIONS "")
set(FASTATTN_ISAS "")

function(fastattn_add_isa isa)
  set(target fastattn_isa_${isa})
  add_library(${target} OBJECT csrc/cpu/isa_${isa}.cpp)
  fastattn_set_flags(${target})
  target_compile_options(${target} PRIVATE ${ARGN})
  target_include_directories(${target} PRIVATE csrc csrc/include)
  string(TOUPPER ${isa} upper)
  set(FASTATTN_ISA_OBJECTS ${FASTATTN_ISA_OBJECTS} $<TARGET_OBJECTS:${target}> PARENT_SCOPE)
  set(FASTATTN_ISA_DEFINITIONS ${FASTATTN_ISA_DEFINITIONS} FASTATTN_HAVE_${upper}=1 PARENT_SCOPE)
  set(FASTATTN_ISAS ${FASTATTN_ISAS} ${isa} PARENT_SCOPE)
  set(FASTATTN_ISA_FLAGS_${isa} ${ARGN} PARENT_SCOPE)
endfunction()

# CMAKE_SYSTEM_PROCESSOR is the target's, also in a cross build; a Mac may say otherwise per build.
set(FASTATTN_ARCH "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)
  list(LENGTH CMAKE_OSX_ARCHITECTURES FASTATTN_OSX_COUNT)
  if(FASTATTN_OSX_COUNT GREATER 1)
    message(FATAL_ERROR "fastattn: build one architecture at a time, got ${CMAKE_OSX_ARCHITECTURES}")
  endif()
  set(FASTATTN_ARCH "${CMAKE_OSX_ARCHITECTURES}")
endif()
string(TOLOWER "${FASTATTN_ARCH}" FASTATTN_ARCH)

set(FASTATTN_AVX512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
if(FASTATTN_ARCH MATCHES "^(x86_64|amd64)$")
  fastattn_add_isa(avx512bf16 ${FASTATTN_AVX512} -mavx512bf16)
  fastattn_add_isa(avx512 ${FASTATTN_AVX512})
  fastattn_add_isa(avx2 -mavx2 -mfma -mf16c)
elseif(FASTATTN_ARCH MATCHES "^(aarch64|arm64)$")
  fastattn_add_isa(neon)  # part of the AArch64 baseline
endif()
fastattn_add_isa(scalar)
message(STATUS "fastattn: instruction sets for ${FASTATTN_ARCH}: ${FASTATTN_ISAS}")
