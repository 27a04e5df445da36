# Flags that every target of ours gets. Nothing is exported to users of the installed package.
#
# -ffp-contract=off: a multiply-add is fused where the code says so and nowhere else, so that a result does
# not depend on the compiler's mood. No -march: an object runs on every CPU of the architecture
# unless cmake/isa.cmake says otherwise.
function(fastattn_set_flags target)
  set_target_properties(${target} PROPERTIES
    CXX_STANDARD 20
    CXX_STANDARD_REQUIRED ON
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE -ffp-contract=off -Wall -Wextra -Wpedantic -Wshadow -Wconversion
    -Wno-sign-conversion)
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
