# `cmake --install`: headers, static library and the CMake package fastattn::fastattn (component "cpp").
include(CMakePackageConfigHelpers)
set(FASTATTN_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/fastattn)

install(TARGETS fastattn EXPORT fastattnTargets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
install(DIRECTORY csrc/include/fastattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp
  FILES_MATCHING PATTERN "*.h")
install(EXPORT fastattnTargets NAMESPACE fastattn:: DESTINATION ${FASTATTN_CMAKE_DIR} COMPONENT cpp)
if(FASTATTN_CUDA_KIND STREQUAL "cuda")
  # A copy of the toolkit's static run time (its licence allows it), so that users of the package need no CUDA. Not
  # merged into libfastattn.a: a program with CUDA code of its own must get one cudart, whichever comes first.
  install(FILES ${FASTATTN_CUDART_STATIC} DESTINATION ${CMAKE_INSTALL_LIBDIR}/fastattn RENAME libcudart_static.a
    COMPONENT cpp)
endif()
configure_package_config_file(cmake/fastattnConfig.cmake.in fastattnConfig.cmake
  INSTALL_DESTINATION ${FASTATTN_CMAKE_DIR})
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}" AND NOT IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  # Then the package cannot tell from its own place where the headers are, and CMake takes the prefix of the
  # configuration. `cmake --install --prefix` may give another.
  install(CODE "file(WRITE \"\$ENV{DESTDIR}${FASTATTN_CMAKE_DIR}/fastattnIncludes.cmake\"
    \"set(FASTATTN_INCLUDE_DIR \\\"\${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_INCLUDEDIR}\\\")\n\")" COMPONENT cpp)
endif()
# Before 1.0 a minor version may change the API.
write_basic_package_version_file(fastattnConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fastattnConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/fastattnConfigVersion.cmake
  DESTINATION ${FASTATTN_CMAKE_DIR} COMPONENT cpp)
