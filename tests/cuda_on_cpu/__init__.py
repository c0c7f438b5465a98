"""CUDA code on machines without a GPU: kernels run by g++, compiled by NVRTC, and the CuPy backend on a stand-in.

Not called `cuda`: pytest puts tests/ on the path, and a package of that name would hide NVIDIA's own, which CuPy
imports.
"""
