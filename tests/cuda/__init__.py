"""CUDA code on machines without a GPU: kernels run by g++, compiled by NVRTC, and the CuPy backend on a stand-in."""
