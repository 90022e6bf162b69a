# Images that build and hold engines. Nothing here needs a GPU to build the image; 'sinkexport build' in it does.
#
#   docker build -t sinkexport .                                    server: CUDA and TensorRT 10
#   docker build -t sinkexport-jetson --build-arg VARIANT=jetson .  Jetson, JetPack 6, on the device or an arm64 builder
#   docker run --rm --gpus all -v "$PWD/bundle:/bundle" sinkexport build /bundle --plugin /opt/sinkexport/libsinkexport_plugin.so
#
# VARIANT: server or jetson. SERVER_IMAGE, JETSON_IMAGE: where TensorRT and its headers come from. CUDA_ARCHITECTURES: of
# the kernels; fewer make a smaller library (87: Jetson Orin).
ARG VARIANT=server
ARG SERVER_IMAGE=nvcr.io/nvidia/tensorrt:25.10-py3
ARG JETSON_IMAGE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${SERVER_IMAGE} AS server-base
ENV CUDA_ARCHITECTURES="80;86;87;89;90;100;120" \
    TENSORRT_INCLUDE=/usr/include/x86_64-linux-gnu

FROM ${JETSON_IMAGE} AS jetson-base
ENV CUDA_ARCHITECTURES="87" \
    TENSORRT_INCLUDE=/usr/include/aarch64-linux-gnu

# The plugin, compiled against the TensorRT that will load it.
FROM ${VARIANT}-base AS plugin
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends cmake g++ ninja-build \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY plugins plugins
COPY runtime/cpp runtime/cpp
RUN cmake -G Ninja -S plugins -B /build -DCMAKE_BUILD_TYPE=Release \
      -DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc \
      "-DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES}" \
      "-DSINKEXPORT_TENSORRT_INCLUDE=${TENSORRT_INCLUDE}" \
 && cmake --build /build --target sinkexport_plugin

# The CPU library: the package in the server image is installed without a compiler.
FROM plugin AS cpu-library
RUN cmake -G Ninja -S plugins/cpu -B /build-cpu -DCMAKE_BUILD_TYPE=Release \
      -DSINKEXPORT_CPU_WARNINGS_ARE_ERRORS=OFF \
 && cmake --build /build-cpu --target sinkexport_cpu

# Server: the Python package beside the image's own tensorrt module.
FROM server-base AS server
COPY --from=plugin /build/trt/libsinkexport_plugin.so /opt/sinkexport/
COPY --from=cpu-library /build-cpu/ort/libsinkexport_cpu.so /opt/sinkexport/
ENV SINKEXPORT_CPU_LIBRARY=/opt/sinkexport/libsinkexport_cpu.so
WORKDIR /opt/sinkexport/src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY exporter exporter
COPY runtime runtime
COPY recipes recipes
RUN python3 -m venv --system-site-packages /opt/sinkexport/venv \
 && /opt/sinkexport/venv/bin/pip install --no-cache-dir . \
 && useradd --create-home --uid 10001 sinkexport
USER 10001
ENTRYPOINT ["/opt/sinkexport/venv/bin/sinkexport"]

# Jetson: its Python is older than this package needs, so engines are built by trtexec, with the plugin.
FROM jetson-base AS jetson
COPY --from=plugin /build/trt/libsinkexport_plugin.so /opt/sinkexport/
RUN useradd --create-home --uid 10001 sinkexport
USER 10001
ENTRYPOINT ["/usr/src/tensorrt/bin/trtexec", "--dynamicPlugins=/opt/sinkexport/libsinkexport_plugin.so"]

# hadolint ignore=DL3006
FROM ${VARIANT}
