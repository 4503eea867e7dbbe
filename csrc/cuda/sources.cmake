# The CUDA kernels, compiled when nvcc is there. Without it device_absent.cpp answers that there are
# none. Their walk on the host is in every build.

if(NOT DEFINED EMO_CUDA) # -DEMO_CUDA=... counts before the environment
  set(EMO_CUDA "$ENV{EMO_CUDA}")
endif()
if(EMO_CUDA STREQUAL "")
  set(EMO_CUDA AUTO)
endif()
if(NOT EMO_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "EMO_CUDA must be AUTO, ON or OFF, got '${EMO_CUDA}'")
endif()

set(EMO_CUDA_STATUS "")
set(EMO_CUDA_ARCHITECTURES_TEXT "")
if(EMO_CUDA STREQUAL "OFF")
  set(EMO_CUDA_STATUS "built with EMO_CUDA=OFF")
else()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    if(EMO_CUDA STREQUAL "ON")
      message(FATAL_ERROR "EMO_CUDA=ON, but no CUDA compiler was found: put nvcc on PATH or name it "
        "in CUDACXX, or build with EMO_CUDA=AUTO or OFF for the CPU kernels alone")
    endif()
    set(EMO_CUDA_STATUS "no CUDA compiler (nvcc) was found at build time")
  endif()
endif()

# What a proof of the kernels on a GPU holds for: a hash of their sources.
file(GLOB EMO_CUDA_FILES CONFIGURE_DEPENDS csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)
list(SORT EMO_CUDA_FILES)
set(EMO_CUDA_SOURCES "")
foreach(file IN LISTS EMO_CUDA_FILES)
  file(SHA256 ${file} hash)
  string(APPEND EMO_CUDA_SOURCES ${hash})
endforeach()
string(SHA256 EMO_CUDA_SOURCES "${EMO_CUDA_SOURCES}")
string(SUBSTRING ${EMO_CUDA_SOURCES} 0 16 EMO_CUDA_SOURCES)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${EMO_CUDA_FILES})

set(EMO_CUDA_WALKS csrc/cuda/walk.cpp csrc/cuda/depthwise_conv2d_walk.cpp
  csrc/cuda/expand_depthwise_walk.cpp csrc/cuda/irmb_walk.cpp)
add_library(emo_kernels_cuda STATIC ${EMO_CUDA_WALKS})
target_include_directories(emo_kernels_cuda PUBLIC csrc)
# The walk's numbers are the kernels': only what is written as a fused product is one. Memory is
# read as pairs of elements.
set_source_files_properties(${EMO_CUDA_WALKS} PROPERTIES COMPILE_OPTIONS
  "-O1;-Wall;-Wextra;-Wno-unknown-pragmas;-Wno-switch;-ffp-contract=off;-fno-strict-aliasing")
if(EMO_CUDA_STATUS STREQUAL "")
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(archs "$ENV{EMO_CUDA_ARCHITECTURES}")
  if(archs STREQUAL "")
    find_program(EMO_NVIDIA_SMI nvidia-smi)
    if(EMO_NVIDIA_SMI)
      execute_process(COMMAND ${EMO_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE caps OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
      if(NOT failed AND caps MATCHES "^[0-9]+\\.[0-9]+")
        string(REPLACE "." "" caps "${caps}")
        string(REPLACE "\n" "," caps "${caps}")
        string(REGEX REPLACE "90" "90a" archs "${caps}")
      endif()
    endif()
  endif()
  if(archs STREQUAL "")
    set(archs "80-real,90a-real,80-virtual")
  endif()
  set(EMO_CUDA_ARCHITECTURES_TEXT "${archs}")
  string(REGEX REPLACE "[, ]+" ";" archs "${archs}")
  list(REMOVE_DUPLICATES archs)
  set(CMAKE_CUDA_ARCHITECTURES ${archs})
  enable_language(CUDA)
  target_sources(emo_kernels_cuda PRIVATE csrc/cuda/device.cu csrc/cuda/depthwise_conv2d.cu
    csrc/cuda/depthwise_conv2d_backward.cu csrc/cuda/expand_depthwise.cu
    csrc/cuda/irmb.cu csrc/cuda/irmb_attention.cu csrc/cuda/irmb_excite.cu
    csrc/cuda/irmb_image.cu)
  set_target_properties(emo_kernels_cuda PROPERTIES CUDA_STANDARD 17 CUDA_ARCHITECTURES "${archs}"
    CUDA_RUNTIME_LIBRARY Static)
  target_compile_options(emo_kernels_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-O3>
    $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false> $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all>)
else()
  target_sources(emo_kernels_cuda PRIVATE csrc/cuda/device_absent.cpp)
endif()
