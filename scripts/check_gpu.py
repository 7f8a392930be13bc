"""Exit 1 and say what is missing unless torch can use a GPU; the end of `make gpu-env`.

python scripts/check_gpu.py
"""

import sys

from pipeline.backbone.device import cuda_problem


def main() -> int:
    """Print the GPUs, or the problem."""
    import torch

    if problem := cuda_problem():
        print(f"error: {problem}", file=sys.stderr)
        return 1
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    print(f"torch {torch.__version__} with CUDA {torch.version.cuda} on {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
