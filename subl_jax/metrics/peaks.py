"""What devices can do at best, by JAX's `device_kind`: the denominators of MFU and MBU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense bfloat16 FLOP/s, and bytes/s of the memory."""

    flops: float
    bandwidth: float


# From the vendors' data sheets (NVIDIA: SXM, without sparsity). A CPU has no entry: its peak depends on the machine, and MFU
# and MBU stay empty there.
PEAKS: Mapping[str, Peak] = {
    "NVIDIA H100 80GB HBM3": Peak(989.4e12, 3.35e12),
    "NVIDIA H200": Peak(989.4e12, 4.8e12),
    "TPU v4": Peak(275e12, 1.2e12),
    "TPU v5 lite": Peak(197e12, 8.1e11),
    "TPU v5": Peak(459e12, 2.765e12),
    "TPU v6 lite": Peak(918e12, 1.64e12),
}
