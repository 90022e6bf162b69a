# The TensorRT backend: CUDA sources and TensorRT's headers. Neither TensorRT nor the plugin is linked, both are loaded
# when a session is; CUDA's runtime is linked statically.
#
# SINKRT_TENSORRT_INCLUDE: folder of NvInfer.h, if it is not found by itself. SINKRT_TENSORRT_RTX: it is TensorRT-RTX's.
option(SINKRT_TENSORRT_RTX "TensorRT-RTX instead of TensorRT" OFF)
set(SINKRT_TENSORRT_INCLUDE "" CACHE PATH "Folder of NvInfer.h")
if(NOT SINKRT_TENSORRT_INCLUDE)
  find_path(SINKRT_TENSORRT_FOUND NvInferRuntime.h PATHS /usr/include/x86_64-linux-gnu /usr/include/aarch64-linux-gnu
                                                         /usr/local/tensorrt/include)
  set(SINKRT_TENSORRT_INCLUDE ${SINKRT_TENSORRT_FOUND})
endif()
if(NOT EXISTS ${SINKRT_TENSORRT_INCLUDE}/NvInferRuntime.h)
  message(FATAL_ERROR "TensorRT's headers: received '${SINKRT_TENSORRT_INCLUDE}', expected the folder of "
                      "NvInferRuntime.h; pass -DSINKRT_TENSORRT_INCLUDE=DIR")
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 86 87 89 90)  # Ampere, Orin, Ada, Hopper
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

target_sources(sinkrt PRIVATE
  src/backends/tensorrt/backend.cpp
  src/backends/tensorrt/buffers.cpp
  src/backends/tensorrt/engine.cpp
  src/backends/tensorrt/library.cpp
  src/backends/tensorrt/prefill.cpp
  src/cuda/device.cpp
  src/cuda/sampling.cu
  src/bundle/engines.cpp)
set_target_properties(sinkrt PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
target_include_directories(sinkrt SYSTEM PRIVATE ${SINKRT_TENSORRT_INCLUDE})
target_link_libraries(sinkrt PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
if(SINKRT_TENSORRT_RTX)
  target_compile_definitions(sinkrt PRIVATE SINKRT_TENSORRT_RTX)
endif()

# Builds engines where there is no Python; needs NvOnnxParser.h too.
if(EXISTS ${SINKRT_TENSORRT_INCLUDE}/NvOnnxParser.h)
  add_executable(sinkrt_build tools/build_engine.cpp tools/weak_types.cpp src/backends/shared_library.cpp
                               src/backends/tensorrt/library.cpp)
  target_include_directories(sinkrt_build PRIVATE src)
  target_include_directories(sinkrt_build SYSTEM PRIVATE ${SINKRT_TENSORRT_INCLUDE})
  if(SINKRT_TENSORRT_RTX)
    target_compile_definitions(sinkrt_build PRIVATE SINKRT_TENSORRT_RTX)
  endif()
  target_link_libraries(sinkrt_build PRIVATE sinkrt CUDA::cudart_static ${CMAKE_DL_LIBS})
  install(TARGETS sinkrt_build)
endif()
