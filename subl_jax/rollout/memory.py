"""Whether keys and values fit, before anything runs: the slots' cache against a limit or the device's free memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging

from subl_jax.metrics.flops import kv_bytes_per_token
from subl_jax.models import decoder
from subl_jax.models.config import ModelConfig
from subl_jax.parallel.devices import Device
from subl_jax.rollout.programs import KEPT, bytes_to_load
from subl_jax.rollout.sampling import SamplingConfig

# Of the free memory, where the number of slots is chosen: activations, logits and the runtime want the rest.
_SHARE = 0.9
# No more slots than this are chosen without being asked for: beyond, a decode step computes rather than reads.
_MOST = 256
_GIB = 2**30


def slot_bytes(config: ModelConfig, sampling: SamplingConfig) -> int:
    """Keys and values of one slot in bytes, all devices of a replica together."""
    item = np.dtype(config.compute_dtype).itemsize
    per_token = kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, item)
    return per_token * sampling.context


def free_bytes(devices: Sequence[Device]) -> int:
    """Free memory of the fullest device; CPU devices share what the machine has."""
    if devices[0].platform == "cpu":
        return _available() // len(devices)
    stats = [device.memory_stats() for device in devices]
    if any(each is None for each in stats):
        raise ValueError(f"{devices[0].device_kind} does not tell how much memory is free; give --config.engine.kv_gib")
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)


def _available() -> int:
    """Bytes that a new process can have without swapping; where the system does not tell, those that nothing uses."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fitted(
    config: ModelConfig,
    params: decoder.Params,
    sampling: SamplingConfig,
    devices: Sequence[Device],
    *,
    groups: int,
    kv_gib: float,
    tensor: int,
) -> SamplingConfig:
    """The sampling whose slots fit: as given, or with as many as do where `slots` is 0.

    Args:
      config, params, sampling: the policy, not yet on the devices; parameters may be abstract.
      devices: that will run it.
      groups: of slots on each replica.
      kv_gib: what keys and values may take of a device; 0: what is free beside the parameters, of which a choice of slots
        leaves a tenth.
      tensor: devices of a replica.

    Raises:
      ValueError: not even one episode fits, or not as many as `slots` says.
    """
    # What is chosen leaves a reserve; what is given, or was chosen earlier, may use it.
    share = 1.0 if sampling.slots else _SHARE
    budget = kv_gib * _GIB or share * (free_bytes(devices) - bytes_to_load(params, devices, tensor))
    one = slot_bytes(config, sampling) / tensor
    room = int(budget // one) - KEPT  # prefixes are kept in slots of their own
    source = f"--config.engine.kv_gib={kv_gib:g}" if kv_gib else f"{budget / _GIB:.2f} GiB that are free for them"
    if room < groups:
        raise ValueError(
            f"keys and values of one episode of rollout.context={sampling.context} tokens take {one / _GIB:.3f} GiB of a "
            f"device; {groups} of them (one per group) and {KEPT} kept prefixes do not fit into {source}; lower "
            "--config.rollout.context, set --config.engine.groups=1, or split the model with --config.engine.tensor"
        )
    if not sampling.slots:
        slots = min(room // groups, _MOST)
        logging.info("rollout.slots=0: %d slots in each of %d groups fit into %s", slots, groups, source)
        return dataclasses.replace(sampling, slots=slots)
    if sampling.slots * groups > room:
        raise ValueError(
            f"{groups} groups of rollout.slots={sampling.slots} with {sampling.context} tokens each and {KEPT} kept prefixes "
            f"take {(sampling.slots * groups + KEPT) * one / _GIB:.2f} GiB of a device, more than {source}; at most "
            f"--config.rollout.slots={room // groups} fit, or 0 to choose so"
        )
    return sampling
