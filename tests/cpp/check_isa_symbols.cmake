# cmake -DNM=nm -DISA=avx2 "-DOBJECTS=a.o;b.o" -P check_isa_symbols.cmake
#
# Fails when an object of one instruction set defines an external or weak symbol besides its entry point
# fastattn::cpu::<isa>_kernels(). The linker keeps any one copy of a weak function (std::min, an inline helper): if it
# kept the AVX-512 copy, every other CPU would die in code that has nothing to do with AVX-512. Constructors of global
# objects are refused too: they run when the library is loaded, whatever the CPU.
cmake_minimum_required(VERSION 3.20)
if(NOT OBJECTS)
  message(FATAL_ERROR "no objects given for ${ISA}")
endif()

set(entry "fastattn::cpu::${ISA}_kernels()")
set(found OFF)
set(leaks "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --extern-only --defined-only ${object}
    OUTPUT_VARIABLE lines ERROR_VARIABLE errors RESULT_VARIABLE failed)
  if(failed)
    message(FATAL_ERROR "${NM} ${object}: ${errors}")
  endif()
  string(REPLACE ";" "," lines "${lines}")
  string(REGEX REPLACE "\n+" ";" lines "${lines}")
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "^[0-9a-fA-F]* *([A-Za-z]) (.+)$")
      continue()
    endif()
    set(symbol "${CMAKE_MATCH_2}")
    if(symbol STREQUAL entry)
      set(found ON)
    elseif(symbol MATCHES "^DW\\.ref\\.")
      # A pointer to the exception personality routine, which position-independent code needs: data, not code.
    else()
      list(APPEND leaks "${line}")
    endif()
  endforeach()
  execute_process(COMMAND ${NM} --defined-only ${object} OUTPUT_VARIABLE all)
  if(all MATCHES "_GLOBAL__(sub_)?[ID]_[^\n]*")
    message(FATAL_ERROR "the ${ISA} objects run code when they are loaded: ${CMAKE_MATCH_0}")
  endif()
endforeach()

if(leaks)
  list(LENGTH leaks count)
  string(REPLACE ";" "\n  " leaks "${leaks}")
  message(FATAL_ERROR "${count} symbols leak from the ${ISA} objects (make them static, or put them in an anonymous "
    "namespace):\n  ${leaks}")
endif()
if(NOT found)
  message(FATAL_ERROR "the ${ISA} objects do not define ${entry}")
endif()
message(STATUS "${ISA}: only ${entry} is visible")
