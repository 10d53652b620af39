# SPDX-License-Identifier: Apache-2.0
#
# The executor: the CUDA kernels, their launchers and their bindings compiled by g++ into Python modules that run them on
# CPU tensors. Development only. Three modules of one source; target `simt` builds all:
#
#   _simt         fast
#   _simt_check   every memory access of a kernel is checked and counted (csrc/simt/checker.cpp)
#   _simt_asan    AddressSanitizer and UBSan; the process must have preloaded libasan
#
# in   Python_EXECUTABLE   the interpreter that will import them; it must have pybind11

if(NOT FRODKERNELS_CUDA_ROOT)
  message(FATAL_ERROR "frodkernels: the executor needs the CUDA toolkit's headers: ${frodkernels_cuda_why}")
endif()
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND "${Python_EXECUTABLE}" -c "import pybind11; print(pybind11.get_include(), end='')"
  OUTPUT_VARIABLE simt_pybind11 COMMAND_ERROR_IS_FATAL ANY)

set(simt_source "${CMAKE_CURRENT_SOURCE_DIR}")
add_library(simt_flags INTERFACE)
target_include_directories(simt_flags INTERFACE "${simt_source}/csrc")
target_include_directories(simt_flags SYSTEM INTERFACE "${FRODKERNELS_CUDA_ROOT}/include")
# Reports name source files by their path in the repository.
target_compile_options(simt_flags INTERFACE -Wall -Wextra -Wno-unused-parameter -Wno-unknown-pragmas
  "-ffile-prefix-map=${simt_source}/=")
target_compile_definitions(simt_flags INTERFACE SIMT_EMU=1)

# The executor itself is never instrumented, so one compilation of it serves all modules.
file(GLOB simt_sources CONFIGURE_DEPENDS "${simt_source}/csrc/simt/*.cpp")
set(simt_checker_sources "${simt_source}/csrc/simt/checker.cpp" "${simt_source}/csrc/simt/shadow.cpp"
  "${simt_source}/csrc/simt/sites.cpp")
list(REMOVE_ITEM simt_sources ${simt_checker_sources})
add_library(simt_executor OBJECT ${simt_sources})
add_library(simt_checker OBJECT ${simt_checker_sources})
foreach(target IN ITEMS simt_executor simt_checker)
  target_link_libraries(${target} PRIVATE simt_flags)
  target_compile_options(${target} PRIVATE -O2)
endforeach()
target_include_directories(simt_executor SYSTEM PRIVATE "${simt_pybind11}" "${Python_INCLUDE_DIRS}")
set_source_files_properties("${simt_source}/csrc/simt/tensor_core.cpp" PROPERTIES COMPILE_OPTIONS "-O3")
set_source_files_properties("${simt_source}/csrc/simt/module.cpp" PROPERTIES COMPILE_OPTIONS "-O1")

file(GLOB simt_kernels CONFIGURE_DEPENDS "${simt_source}/csrc/cuda/*.cu" "${simt_source}/csrc/simt/planted/*.cu")
file(GLOB simt_bindings CONFIGURE_DEPENDS "${simt_source}/csrc/ops/cuda/*.cpp")
set_source_files_properties(${simt_kernels} PROPERTIES LANGUAGE CXX)

set(simt_exports "${CMAKE_CURRENT_BINARY_DIR}/exports.map")
file(CONFIGURE OUTPUT "${simt_exports}" CONTENT "{ global: PyInit_*; local: *; };\n")

# frodkernels_simt_module(name, objects of the checker or nothing, flags of the kernels...)
function(frodkernels_simt_module name checker)
  add_library(${name}_kernels OBJECT ${simt_kernels})
  set_target_properties(${name}_kernels PROPERTIES CXX_STANDARD 17)
  target_link_libraries(${name}_kernels PRIVATE simt_flags)
  target_compile_options(${name}_kernels PRIVATE ${ARGN})

  string(REGEX REPLACE "^_" "" namespace "${name}")
  add_library(${name}_bindings OBJECT ${simt_bindings})
  target_link_libraries(${name}_bindings PRIVATE simt_flags frodkernels_torch)
  target_compile_definitions(${name}_bindings PRIVATE FRODKERNELS_OP_NAMESPACE=${namespace})
  target_compile_options(${name}_bindings PRIVATE -O1)

  add_library(${name} MODULE)
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".${Python_SOABI}.so" LINKER_LANGUAGE CXX)
  target_link_libraries(${name} PRIVATE ${name}_kernels ${name}_bindings simt_executor ${checker})
  # The modules and the library share names: each binds to its own and shows none.
  target_link_options(${name} PRIVATE -Wl,-Bsymbolic "-Wl,--version-script=${simt_exports}")
  target_link_libraries(${name} PRIVATE "-L${FRODKERNELS_TORCH_DIR}/lib" -ltorch_cpu ${CMAKE_DL_LIBS} pthread)
  add_dependencies(simt ${name})
endfunction()

add_custom_target(simt)
frodkernels_simt_module(_simt "" -O2 -g1)
# Compiled for ThreadSanitizer, linked without it: the checker answers the calls that the compiler inserts.
frodkernels_simt_module(_simt_check simt_checker
  -O1 -g -DSIMT_CHECK=1 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0)
frodkernels_simt_module(_simt_asan "" -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all)
target_link_options(_simt_asan PRIVATE -fsanitize=address,undefined)
