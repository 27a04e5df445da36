# cmake -DBUILD=<build tree> -DWORK=<scratch> -DCONSUMER=<source> [-DTOOLCHAIN=…] [-DEMULATOR=…] -P check_package.cmake
#
# Installs the C++ component into an empty prefix, builds the ten-line consumer against it with
# find_package(fastattn) and runs it.
cmake_minimum_required(VERSION 3.20)

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\n${output}")
  endif()
  set(output "${output}" PARENT_SCOPE)
endfunction()

file(REMOVE_RECURSE ${WORK})
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix --component cpp)
set(options -DCMAKE_BUILD_TYPE=Release)
if(TOOLCHAIN)
  # A prefix of ours is not in the sysroot: name the package's folder instead of the prefix.
  list(APPEND options -DCMAKE_TOOLCHAIN_FILE=${TOOLCHAIN})
endif()
file(GLOB_RECURSE config ${WORK}/prefix/*/fastattnConfig.cmake)
get_filename_component(package "${config}" DIRECTORY)
run(${CMAKE_COMMAND} -S ${CONSUMER} -B ${WORK}/build -Dfastattn_DIR=${package} ${options})
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${EMULATOR} ${WORK}/build/consumer)
message(STATUS "${output}")

# softmax([1,0]/sqrt(2)) = (0.66976, 0.33024), so the rows are 3 - 2·0.66976 = 1.66048 and so on.
if(NOT output MATCHES "^[0-9]+\\.[0-9]+\\.[0-9]+ 1\\.66047[0-9] 2\\.66047[0-9] 2\\.33952[0-9] 3\\.33952[0-9]")
  message(FATAL_ERROR "the consumer printed: ${output}")
endif()
