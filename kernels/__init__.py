"""The formulas: activations, losses, updates and random numbers. NumPy and CUDA text; never imports CuPy.

Installed as `gpu_bp.kernels`; use it through `gpu_bp.registry`.
"""
