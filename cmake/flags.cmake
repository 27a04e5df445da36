# Flags that every target of ours gets. Nothing is exported to users of the installed package.
#
# -ffp-contract=off: a multiply-add is fused where the code says so and nowhere else, so that a result does
# not depend on the compiler's mood. No -march: an object runs on every CPU of the architecture
# unless cmake/isa.cmake says otherwise.
#
# CXXFLAGS, CMAKE_CXX_FLAGS and their like come before ours. What they may ask for beyond the arithmetic of IEEE 754 is
# taken back, flag by flag: GCC's -fno-fast-math takes back -ffast-math alone, not what somebody asks for by its own
# name. csrc/core/ieee_arithmetic.h is the proof, in every object. When it links, GCC would also add a start-up object
# that has every thread flush denormals, for the whole process that loads our module.
if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  set(FASTATTN_IEEE_FLAGS -fno-fast-math -fno-unsafe-math-optimizations -fno-finite-math-only -fhonor-nans
    -fhonor-infinities -fno-associative-math -fno-reciprocal-math -fsigned-zeros)
else()
  set(FASTATTN_IEEE_FLAGS -fno-fast-math -fno-unsafe-math-optimizations -fno-finite-math-only -fno-associative-math
    -fno-reciprocal-math -fsigned-zeros -ftrapping-math -fno-single-precision-constant -fno-allow-store-data-races)
endif()
# -O2: the linker's driver looks for the word -Ofast, which only another level of optimisation takes back.
set(FASTATTN_IEEE_LINK_FLAGS -O2 -fno-fast-math -fno-unsafe-math-optimizations)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 13 AND
    CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  list(APPEND FASTATTN_IEEE_LINK_FLAGS -mno-daz-ftz)
endif()

function(fastattn_set_flags target)
  set_target_properties(${target} PROPERTIES
    CXX_STANDARD 20
    CXX_STANDARD_REQUIRED ON
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE ${FASTATTN_IEEE_FLAGS}
    "SHELL:-include \"${PROJECT_SOURCE_DIR}/csrc/core/ieee_arithmetic.h\"" -ffp-contract=off -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wno-sign-conversion)
  get_target_property(type ${target} TYPE)
  if(NOT type MATCHES "^(STATIC|OBJECT)_LIBRARY$")
    target_link_options(${target} PRIVATE ${FASTATTN_IEEE_LINK_FLAGS})
  endif()
  if(FASTATTN_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(FASTATTN_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${FASTATTN_SANITIZE} -fno-omit-frame-pointer
      -fno-sanitize-recover=all)
    # PUBLIC for the static library: whoever links it needs the sanitizer's run time.
    target_link_options(${target} PUBLIC -fsanitize=${FASTATTN_SANITIZE})
  endif()
endfunction()
