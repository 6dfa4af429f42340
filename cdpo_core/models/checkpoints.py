"""Hugging Face model folders: checked before they are loaded, and saved so that equal weights give equal bytes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpo_core.errors import InputError

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The file of a fast tokenizer, and those that transformers makes one of.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Safetensors' words for the number formats coarser than float32.
FORMATS = {"BF16": "bfloat16", "F16": "float16"}
PATH_STARTS = ("/", ".", "~")
HUB_TIMEOUT_SECONDS = 10.0
# What transformers writes into its JSON files that is no content: where a model came from, and its own version.
VOLATILE_KEYS = ("_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only")


def check_model(base: str, revision: str = "") -> None:
    """Check a model given by path or hub id, without loading or downloading it.

    Args:
        base: see `is_local`.
        revision: of a hub id; "" is the newest.

    Raises:
        InputError: as `check_model_folder`; it has no tokenizer; or the hub has no such model, or one
            without safetensors, or cannot be reached while nothing is cached.
    """
    if is_local(base) or is_offline():
        folder = local_folder(base, revision)
        check_model_folder(folder)
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise InputError(
                "the model folder has no tokenizer",
                where=str(folder),
                fix=f"add what the tokenizer's save_pretrained writes, {TOKENIZERS[0]}",
            )
        return
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().model_info(base, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS).siblings or []
    except Exception as error:  # each transport has errors of its own
        try:
            snapshot_download(base, revision=revision or None, local_files_only=True)
        except (OSError, ValueError):
            raise not_loaded(base, error) from error
        return
    names = sorted(file.rfilename for file in files)
    if not any(name.endswith(".safetensors") for name in names):
        raise _no_safetensors(base, names)


def check_model_folder(path: str | Path) -> None:
    """Check a local model folder without loading it: config, safetensors weights, none of them cut short.

    Args:
        path: a folder in Hugging Face's layout.

    Raises:
        InputError: the folder or its config.json is missing or broken, it holds no safetensors, or
            a weight file is shorter or longer than its own header says.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError("the model folder does not exist", where=str(path), fix="check the path, or give a hub id")
    read_model_config(folder)
    for file in weight_files(folder):
        check_safetensors(file)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        InputError: it is missing, not JSON, or not an object.
    """
    path = folder / "config.json"
    fix = "point at the folder that save_pretrained wrote"
    if not path.is_file():
        raise InputError("the model folder has no config.json", where=str(folder), fix=fix)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"config.json is not JSON: {error}", where=str(path), fix=fix) from error
    if not isinstance(config, dict):
        raise InputError("config.json holds no object", where=str(path), fix=fix)
    return config


def saved_dtype(folder: Path) -> torch.dtype:
    """The number format that a model folder's weights were saved in; float32 where it does not say."""
    import torch

    return getattr(torch, read_model_config(folder).get("dtype") or "float32")


def weights_format(folder: Path) -> str:
    """The number format a model folder loads in, without loading it: as its config says, else as its weights are.

    Raises:
        InputError: as `read_model_config` and `weight_files`.
    """
    config = read_model_config(folder)
    said = config.get("dtype") or config.get("torch_dtype")
    if said:
        return str(said).removeprefix("torch.")
    with weight_files(folder)[0].open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    codes = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return next((name for code, name in FORMATS.items() if code in codes), "float32")


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, all shards that its index names.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        raise _no_safetensors(str(folder), sorted(path.name for path in folder.iterdir()))
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError("the index of the weights cannot be read", where=str(index), fix="copy it again") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(shards)} weight files are missing: {missing[0]}",
            where=str(folder),
            fix="copy the model folder again, whole",
        )
    return [folder / shard for shard in shards]


def _no_safetensors(where: str, files: Sequence[str]) -> InputError:
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if not pickles:
        return InputError(
            f"the model has no {WEIGHTS}",
            where=where,
            fix="point at the folder that save_pretrained wrote",
        )
    return InputError(
        f"the model holds its weights only as pickle ({pickles[0]}), which can run code and is never read",
        where=where,
        fix="convert it once where you trust it: load it with transformers' from_pretrained(model, "
        f"use_safetensors=False) and write it with save_pretrained(new_folder), which makes {WEIGHTS}",
    )


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's size: 8 bytes of header length, the JSON header, the data its offsets span.

    Raises:
        InputError: it is missing, cut short or damaged.
    """
    if not path.is_file():
        raise InputError("the weights are missing", where=str(path), fix="copy the model folder again, whole")
    size = path.stat().st_size
    truncated = InputError(
        f"the weights are cut short or damaged ({size:,} bytes)", where=str(path), fix="copy or download the file again"
    )
    with path.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise truncated
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise truncated
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise truncated from error
    if 8 + length + end != size:
        raise truncated


def is_local(base: str | Path) -> bool:
    """Whether a model's name means a path: it exists, or starts with `/`, `.` or `~`; else it is a hub id."""
    return str(base).startswith(PATH_STARTS) or Path(base).exists()


def local_folder(base: str | Path, revision: str = "") -> Path:
    """The folder of a model given by path, or of a hub id's snapshot, downloaded unless it is cached.

    Raises:
        InputError: the hub has no such model, or cannot be reached.
    """
    if is_local(base):
        return Path(base).expanduser()
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            str(base),
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            local_files_only=is_offline(),
        )
    except (OSError, ValueError) as error:
        if is_offline():
            raise InputError(
                "the model is not in the local cache, and HF_HUB_OFFLINE forbids to download it",
                where=str(base),
                fix="give a folder, or unset HF_HUB_OFFLINE",
            ) from error
        raise not_loaded(base, error) from error
    return Path(snapshot)


def not_loaded(base: str | Path, error: Exception) -> InputError:
    """The error for a model that transformers or the hub refused."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return own_code(base)
    return InputError(
        f"the model cannot be loaded: {reason}",
        where=str(base),
        fix="check the path or hub id; without a network only local folders and cached models load",
    )


def check_own_code(folder: Path) -> None:
    """Check that a model folder loads without code that comes with it.

    Raises:
        InputError: transformers does not know its kind, and the folder brings code for it.
    """
    config = read_model_config(folder)
    if config.get("auto_map"):
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise own_code(folder)


def own_code(base: str | Path) -> InputError:
    """The error for a model that loads only with code that comes with it, which may not run."""
    return InputError(
        "the model comes with code of its own, which is not run",
        where=str(base),
        fix="if you trust it, set trust_remote_code beside its base: of policy, reward or constraints.N",
    )


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def quiet_transformers() -> None:
    """Keep transformers' own progress bars out of terminals and logs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def hub_options(base: str | Path, revision: str = "", trust_remote_code: bool = False) -> dict[str, Any]:
    """Options for every from_pretrained call on `base`, which may be a path or a hub id."""
    local = is_local(base)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local or is_offline()}
    if revision and not local:
        options["revision"] = revision
    return options


def scrub_folder(folder: Path) -> None:
    """Remove what is no content from the JSON files that transformers wrote, and sort their keys."""
    for path in sorted(folder.glob("*.json")):
        if path.name == "tokenizer.json":
            continue
        content = json.loads(path.read_text())
        write_json(path, {key: value for key, value in content.items() if key not in VOLATILE_KEYS})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as sorted, indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
