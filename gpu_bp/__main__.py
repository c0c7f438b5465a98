"""`python -m gpu_bp`: the command line."""

from gpu_bp.cli import main

if __name__ == "__main__":
    main()
