"""The folder in which a model is quantised: one file for each thing that is done, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weft.comet.fmpq import BlockCosts
from weft.comet.layer import LayerPlan, SitePlan
from weft.comet.report import LayerRow, SiteRow
from weft.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"


def shard(folder: Path, number: int, layers: int) -> Path:
    """The file of layer `number`; `layers` itself stands for what is not in a layer."""
    return folder / f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"


def save_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside its place, then move it there. Raises CheckpointError where the disk refuses."""
    new = path.with_suffix(".new")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata)
        new.chmod(0o644)  # safetensors makes files that only their owner reads
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}; once it can be, the same command goes on where this one stopped"
        ) from error


def save_layer(path: Path, index: int, tensors: dict[str, torch.Tensor], row: LayerRow) -> None:
    """The shard of one layer, and beside it the layer's row of the report. Where the shard is, the row is too."""
    _row_file(path).write_text(json.dumps(asdict(row)))
    save_whole(path, {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}, {"format": "pt"})


def load_layer(path: Path, index: int) -> tuple[dict[str, torch.Tensor], LayerRow]:
    """The tensors by their names below model.layers.N, and the layer's row of the report."""
    tensors, _ = _read(path)
    raw = json.loads(_row_file(path).read_bytes())
    row = LayerRow(raw["index"], tuple(SiteRow(**site) for site in raw["sites"]), raw["held_out_decibels"])
    return {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in tensors.items()}, row


def save_plan(path: Path, plan: LayerPlan) -> None:
    tensors = {f"{site}.scaling": one.scaling for site, one in plan.sites.items()}
    tensors |= {f"{site}.order": one.order for site, one in plan.sites.items()}
    tensors["key_scaling"] = plan.key_scaling
    described = {
        "hadamard": {site: one.hadamard for site, one in plan.sites.items()},
        "value_transform": plan.value_transform,
        "costs": {site: asdict(costs) for site, costs in plan.costs.items()},
        "blocks": plan.blocks,
    }
    save_whole(path, tensors, {"plan": json.dumps(described)})


def load_plan(path: Path) -> LayerPlan:
    tensors, metadata = _read(path)
    raw = json.loads(metadata["plan"])
    sites = {
        site: SitePlan(tensors[f"{site}.scaling"], tensors[f"{site}.order"], flag)
        for site, flag in raw["hadamard"].items()
    }
    costs = {site: BlockCosts(tuple(one["nats"]), one["outputs"]) for site, one in raw["costs"].items()}
    return LayerPlan(sites, raw["value_transform"], tensors["key_scaling"], costs, raw["blocks"])


def save_rows(path: Path, rows: torch.Tensor) -> None:
    save_whole(path, {"rows": rows}, {})


def take_rows(path: Path) -> torch.Tensor:
    """The rows of `save_rows`; their file goes."""
    tensors, _ = _read(path)
    path.unlink()
    return tensors["rows"]


def write_index(folder: Path, layers: int) -> None:
    """model.safetensors.index.json over the shards; the plans and what was left unfinished go."""
    names: dict[str, str] = {}
    size = 0
    for number in range(layers + 1):
        path = shard(folder, number, layers)
        with safe_open(path, "pt") as file:
            names |= dict.fromkeys(file.keys(), path.name)
        size += path.stat().st_size
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n")
    for pattern in ("plan-*.safetensors", "rows-*.safetensors", "*.row", "*.new"):
        for path in folder.glob(pattern):
            path.unlink()


def _row_file(path: Path) -> Path:
    return path.with_suffix(".row")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove its folder to begin anew") from error
