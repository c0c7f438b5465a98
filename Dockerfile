# gpu_bp with CuPy on NVIDIA's CUDA base image. Build: docker build -t gpu-bp .
# The base image is small, without cuBLAS and NVRTC: the cuda13 extra brings these as wheels, and mpi brings MPICH.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /source/
COPY gpu_bp /source/gpu_bp
COPY kernels /source/kernels
RUN python3 -m venv /opt/gpu-bp && /opt/gpu-bp/bin/pip install --no-cache-dir '/source[cuda13,mpi]' && rm -rf /source
ENV PATH=/opt/gpu-bp/bin:$PATH

# Not as root; configs and data are mounted into the working folder, which is nowhere near the source. CuPy keeps its
# compiled kernels, and matplotlib its font list, in the home folder.
RUN useradd --create-home --uid 10001 trainer && mkdir /workspace && chown trainer /workspace
USER trainer
WORKDIR /workspace
ENTRYPOINT ["gpu-bp"]
CMD ["info"]
