"""What rounding costs: drac_amort.py with every factor of every matrix product, forward and backward, in bfloat16.

    python assets/results/bfloat16.py --env-id MultiGoalPointMaze-Hard-v0 --seed 1 --matmul-precision medium

Sums stay in float32. This is what `--matmul-precision medium` does on CPUs with AMX, on any CPU, if slowly.
"""

import sys
from pathlib import Path

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import drac_amort  # noqa: E402

FIRST_FACTOR = {"mm": 0, "bmm": 0, "linear": 0, "addmm": 1, "baddbmm": 1}  # among the arguments


class Rounded(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Tensor:
        first = FIRST_FACTOR.get(function.overloadpacket.__name__)
        if first is not None:
            factors = [factor.bfloat16().float() for factor in args[first : first + 2]]
            args = (*args[:first], *factors, *args[first + 2 :])
        return function(*args, **(kwargs or {}))


if __name__ == "__main__":
    with Rounded():
        drac_amort.main()
