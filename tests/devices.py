"""Where models compute in tests: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = pytest.param("cuda", marks=NEEDS_GPU)
DEVICES = ["cpu", GPU]
