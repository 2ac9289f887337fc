# The core as a CMake package, for programs without torch: find_package(block_sparse) gives the target
# block_sparse::block_sparse. It is the component "core" of an installation.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(CORE COMPONENT core)
if(BLOCK_SPARSE_TORCH)
  list(APPEND CORE EXCLUDE_FROM_ALL)  # a full installation is the wheel: what Python needs, no more
endif()

set_target_properties(block_sparse_core PROPERTIES
  OUTPUT_NAME block_sparse EXPORT_NAME block_sparse)
target_compile_features(block_sparse_core INTERFACE cxx_std_20)
target_include_directories(block_sparse_core INTERFACE
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

set(PACKAGE ${CMAKE_INSTALL_LIBDIR}/cmake/block_sparse)
install(TARGETS block_sparse_core EXPORT block_sparse
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} ${CORE})
install(DIRECTORY include/block_sparse DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} ${CORE})
# It depends on no other package, so the list of its targets is all that find_package needs.
install(EXPORT block_sparse FILE block_sparse-config.cmake NAMESPACE block_sparse::
  DESTINATION ${PACKAGE} ${CORE})
write_basic_package_version_file(block_sparse-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/block_sparse-config-version.cmake
  DESTINATION ${PACKAGE} ${CORE})
