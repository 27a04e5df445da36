# cmake -DSOURCE=<checkout> -DWORK=<scratch> -P check_cuda_architectures.cmake
#
# The choice of architectures beside stand-ins for nvidia-smi.
cmake_minimum_required(VERSION 3.20)
include(${SOURCE}/cmake/cuda_architectures.cmake)

# Expects a list and a remark; `output` is what nvidia-smi prints, and `status` how it ends.
function(expect choice asked output status architectures remark)
  file(REMOVE_RECURSE ${WORK})
  file(WRITE ${WORK}/nvidia-smi "#!/bin/sh\nprintf '${output}'\nexit ${status}\n")
  file(CHMOD ${WORK}/nvidia-smi PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
  set(ENV{PATH} "${WORK}:/usr/bin:/bin")
  set(FASTATTN_CUDA_CHOICE ${choice})
  set(FASTATTN_CUDA_ARCHITECTURES ${asked})
  fastattn_choose_architectures(found said)
  if(NOT "${found}" STREQUAL "${architectures}" OR NOT "${said}" STREQUAL "${remark}")
    message(SEND_ERROR "${choice} '${asked}' beside '${output}' (${status}): '${found}', '${said}'")
  endif()
endfunction()

set(all ${FASTATTN_CUDA_ALL_ARCHITECTURES})
set(visible " of the GPUs that were visible")
set(none ", as no GPU was visible")
expect(AUTO "" "9.0\\n" 0 "90-real" "${visible}")
expect(AUTO "" "8.6\\n12.0\\n8.6\\n" 0 "86-real;120-real" "${visible}")
expect(AUTO "" "" 9 "80-virtual;90a-real" "${none}")
expect(AUTO "" "No devices were found\\n" 0 "80-virtual;90a-real" "${none}")
expect(AUTO "" "9.0\\n" 1 "80-virtual;90a-real" "${none}")
expect(AUTO "75" "9.0\\n" 0 "75" "")
expect(ON "" "9.0\\n" 0 "${all}" "")
expect(ON "80;90-real" "" 9 "80;90-real" "")
