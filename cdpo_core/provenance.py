"""What computed an artifact: library versions, device, threads, number format, micro-batch. Said, and in no key.

The one exception: where numbers are coarser than float32, the device and the micro-batch change results and not only
their rounding, and `pipeline.machine_fields` puts them into the key.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdpo_core.artifacts import Manifest
    from cdpo_core.stages import Runtime

# What a scratch folder says of the machines that worked in it.
MACHINES = "machines.json"


@cache
def library_versions() -> dict[str, str]:
    """Versions of what computes."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@cache
def device_kind(device: str) -> str:
    """The processor's model for `cpu`, the GPU's for `cuda`, whichever a stage would take for `auto`."""
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"{device}: {_gpu() if device.startswith('cuda') else _processor()}"


def machine_record(runtime: Runtime) -> dict[str, Any]:
    """{versions, device, threads, dtype, micro_batch, processes} of a stage that this process computes now."""
    return {
        "versions": library_versions(),
        # Only models are put on a device.
        "device": device_kind(runtime.device if runtime.dtype else "cpu"),
        "threads": runtime.threads or os.cpu_count() or 1,
        "dtype": runtime.dtype,
        "micro_batch": runtime.micro_batch,
        "processes": 1,
    }


def others_before(scratch: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Other machines that worked in a stage's scratch folder, whose part may be continued; this one is entered."""
    path = scratch / MACHINES
    try:
        known = [item for item in json.loads(path.read_text()) if isinstance(item, dict)]
    except (OSError, ValueError):
        known = []
    others = [item for item in known if item != record]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([*others, record]))
    partial.replace(path)
    return others


def records_of(manifest: Manifest) -> list[dict[str, Any]]:
    """The machines that computed an artifact, the last one first; older manifests say versions only."""
    last = {"versions": manifest.versions, **manifest.machine}
    return [last, *manifest.earlier]


def by_machine(used: Sequence[tuple[str, Manifest]]) -> list[dict[str, Any]]:
    """What computed the artifacts of a run, in the order of first use.

    Args:
        used: (label, manifest) of each.

    Returns:
        {versions, device, ..., stages: [labels]} for each distinct machine.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, manifest in used:
        for record in records_of(manifest):
            entry = found.setdefault(json.dumps(record, sort_keys=True), {**record, "stages": []})
            if label not in entry["stages"]:
                entry["stages"].append(label)
    return list(found.values())


def mixed(machines: Sequence[Mapping[str, Any]]) -> str:
    """One line if artifacts of different devices or library versions come together; "" if not.

    Args:
        machines: as `by_machine` returns them.
    """
    devices: dict[str, list[str]] = {}
    for item in machines:
        # Data and splits are made beside a GPU by the processor: only where models computed, devices compare.
        if item.get("dtype"):
            devices.setdefault(str(item["device"]), []).extend(item["stages"])
    parts = [_parts("devices", devices)] if len(devices) > 1 else []
    for name in sorted({name for item in machines for name in item["versions"]}):
        versions: dict[str, list[str]] = {}
        for item in machines:
            if name in item["versions"]:
                versions.setdefault(item["versions"][name], []).extend(item["stages"])
        if len(versions) > 1:
            parts.append(_parts(name, versions))
    return f"artifacts of different machines are mixed: {'; '.join(parts)}" if parts else ""


def _parts(what: str, stages: Mapping[str, Sequence[str]]) -> str:
    counts = (f"{value} ({len(labels)} stage{'s' if len(labels) > 1 else ''})" for value, labels in stages.items())
    return f"{what} {', '.join(counts)}"


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0].strip() if names else platform.processor() or 'unknown'} ({platform.machine()})"


def _gpu() -> str:
    # The driver's own list opens no context, which would hold GPU memory in a process that only asks.
    said = (path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = {name.strip() for text in said for name in re.findall(r"^Model:\s*(.+)$", text, re.MULTILINE)}
    if len(names) == 1:
        return names.pop()
    import torch

    return str(torch.cuda.get_device_name())
