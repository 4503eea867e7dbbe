# The CPU kernels: every *_kernel.cpp is compiled once per instruction set, the rest once.
#
# -DEMO_CPU_ISAS="portable;avx512" compiles fewer of them: a quick build of a kernel at work on.
set(EMO_ISA_FLAGS_portable "")
set(EMO_ISAS portable)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND EMO_ISAS avx2 avx512)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mavx512bf16 EMO_COMPILES_AVX512BF16) # GCC 10, Clang 9
  if(EMO_COMPILES_AVX512BF16)
    list(APPEND EMO_ISAS avx512bf16)
  endif()
  set(EMO_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(EMO_ISA_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c
      -mprefer-vector-width=512)
  set(EMO_ISA_FLAGS_avx512bf16 ${EMO_ISA_FLAGS_avx512} -mavx512bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  list(APPEND EMO_ISAS neon)
  set(EMO_ISA_FLAGS_neon "")
endif()
if(EMO_CPU_ISAS)
  set(EMO_ISAS ${EMO_CPU_ISAS})
endif()
if("avx512bf16" IN_LIST EMO_ISAS AND NOT "avx512" IN_LIST EMO_ISAS)
  list(APPEND EMO_ISAS avx512) # its fp32 kernels
endif()

set(EMO_WARNINGS -Wall -Wextra -Wno-psabi -Wno-unknown-pragmas
    -Wno-uninitialized -Wno-maybe-uninitialized) # GCC 12: false alarms inside its own avx512fintrin.h
set(EMO_CPU_KERNELS irmb conv_norm_act conv_norm_act_backward norm_pool_linear pixels depthwise_conv2d depthwise_conv2d_backward expand expand_backward
    expand_depthwise expand_depthwise_backward shrink shrink_backward window_attention window_attention_backward)
set(EMO_CPU_KERNELS_avx512bf16 irmb expand expand_backward
    expand_depthwise expand_depthwise_backward shrink shrink_backward) # what has bfloat16 products; the rest runs as avx512
add_library(emo_kernels_cpu STATIC csrc/cpu/batch_norm.cpp csrc/cpu/convert.cpp csrc/cpu/irmb.cpp csrc/cpu/irmb_plan.cpp csrc/cpu/isa.cpp
    csrc/cpu/threads.cpp csrc/cpu/training.cpp)
target_include_directories(emo_kernels_cpu PUBLIC csrc)
target_compile_options(emo_kernels_cpu PRIVATE ${EMO_OPTIMIZATION} ${EMO_WARNINGS})
target_link_libraries(emo_kernels_cpu PRIVATE OpenMP::OpenMP_CXX)

foreach(isa IN LISTS EMO_ISAS)
  string(TOUPPER ${isa} ISA)
  target_compile_definitions(emo_kernels_cpu PRIVATE EMO_HAS_${ISA})
  set(kernels ${EMO_CPU_KERNELS})
  if(EMO_CPU_KERNELS_${isa})
    set(kernels ${EMO_CPU_KERNELS_${isa}})
  endif()
  list(TRANSFORM kernels REPLACE "(.+)" "csrc/cpu/\\1_kernel.cpp")
  add_library(emo_kernels_cpu_${isa} OBJECT ${kernels})
  target_include_directories(emo_kernels_cpu_${isa} PRIVATE csrc)
  target_compile_definitions(emo_kernels_cpu_${isa} PRIVATE EMO_ISA=${isa} EMO_ISA_${ISA})
  target_compile_options(emo_kernels_cpu_${isa} PRIVATE
    ${EMO_OPTIMIZATION} -fno-math-errno -fno-trapping-math -ffp-contract=fast ${EMO_WARNINGS}
    ${EMO_ISA_FLAGS_${isa}})
  # A weak symbol compiled with AVX-512 could be linked into the portable path: refuse to build one.
  add_custom_command(TARGET emo_kernels_cpu PRE_LINK
    COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=$<TARGET_OBJECTS:emo_kernels_cpu_${isa}>"
            -P ${CMAKE_SOURCE_DIR}/csrc/cpu/check_symbols.cmake
    VERBATIM)
  target_sources(emo_kernels_cpu PRIVATE $<TARGET_OBJECTS:emo_kernels_cpu_${isa}>)
endforeach()
