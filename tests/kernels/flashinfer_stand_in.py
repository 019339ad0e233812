"""A stand-in for what weft calls of flashinfer-python: its two wrappers over paged KV, with their signatures, in torch.

It is stricter than the package where that would read wrong memory or wait for the device without a word. In graph mode
`run` reads the buffers it was given, as a recorded graph does, and nothing that `plan` was told later.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch


def _attend(
    q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], pages: list[list[int]], used: list[int], rows: list[int],
    *, causal: bool, window_left: int, sm_scale: float, out: torch.Tensor,
) -> None:  # fmt: skip
    """pages, used: of each sequence the pages, and the tokens in the last of them; rows: where its queries begin."""
    size, group = kv[0].shape[2], q.shape[1] // kv[0].shape[1]
    for begin, end, named, last in zip(rows[:-1], rows[1:], pages, used, strict=True):
        length = (len(named) - 1) * size + last
        keys, values = (part[named].transpose(0, 1).flatten(1, 2)[:, :length].double() for part in kv)
        queries = q[begin:end].double().transpose(0, 1)  # [heads, rows, D]
        scores = torch.einsum("hqd,hkd->hqk", queries, keys.repeat_interleave(group, 0)) * sm_scale
        place = torch.arange(length - (end - begin), length)[:, None]
        distance = place - torch.arange(length)
        hidden = (distance < 0) & causal
        if window_left >= 0:
            hidden |= distance > window_left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = (weights @ values.repeat_interleave(group, 0)).transpose(0, 1)


class _Paged:
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str, graph: bool, buffers: Any) -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and kv_layout == "HND"
        self.graph, self.buffers, self.told = graph, buffers, {}

    def _take(self, indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, page_size: int) -> None:
        counts = indptr[1:] - indptr[:-1]
        assert {indptr.dtype, indices.dtype, last.dtype} == {torch.int32}
        assert indptr.device.type == last.device.type == "cpu", "it would wait for the device to read them"
        assert len(indices) == indptr[-1] and len(last) == len(counts)
        assert (counts > 0).all() and (last > 0).all() and (last <= page_size).all()
        given = indptr, indices, last
        if not self.graph:
            self.buffers = tuple(tensor.clone() for tensor in given)
            return
        assert len(last) == len(self.buffers[2]) and len(indices) <= len(self.buffers[1]), "the size is fixed"
        for buffer, tensor in zip(self.buffers, given, strict=True):
            buffer[: len(tensor)].copy_(tensor)

    def _run(self, q: torch.Tensor, paged_kv_cache: Any, rows: list[int], out: torch.Tensor | None) -> torch.Tensor:
        kv, told = paged_kv_cache, self.told
        assert told, "plan comes before run"
        shape = (told["kv_heads"], told["page_size"], told["head_dim"])
        assert all(part.shape[1:] == shape and part.dtype is told["kv_type"] for part in kv)
        assert q.shape == (rows[-1], told["heads"], told["head_dim"]) and q.dtype is told["q_type"]
        starts, indices, last = (buffer.tolist() for buffer in self.buffers)
        pages = [indices[a:b] for a, b in pairwise(starts)]
        out = torch.zeros_like(q) if out is None else out
        _attend(
            q, kv, pages, last, rows, causal=told["causal"], window_left=told["window_left"],
            sm_scale=told["sm_scale"], out=out,
        )  # fmt: skip
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False):
        assert not use_cuda_graph
        super().__init__(float_workspace_buffer, kv_layout, False, None)
        self.rows: list[int] = []

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        assert qo_indptr.dtype is torch.int32 and qo_indptr.device.type == "cpu"
        self._take(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self.rows = qo_indptr.tolist()
        self.told = _told(num_qo_heads, num_kv_heads, head_dim_qk, page_size, q_data_type, kv_data_type)
        self.told |= {"causal": causal, "window_left": window_left, "sm_scale": sm_scale or head_dim_qk**-0.5}

    def run(self, q: torch.Tensor, paged_kv_cache: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._run(q, paged_kv_cache, self.rows, out)


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert all((buffer is not None) is use_cuda_graph for buffer in buffers)
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers)
        self.tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        sm_scale: float | None = None,
    ) -> None:
        group = num_qo_heads // num_kv_heads
        assert self.tensor_cores or group in (1, 2, 3, 4, 8), "there is no such kernel"
        self._take(indptr, indices, last_page_len, page_size)
        told = _told(num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type)
        told |= {"causal": False, "window_left": window_left, "sm_scale": sm_scale or head_dim**-0.5}
        assert not (self.graph and self.told) or told == self.told, "a graph holds what it was recorded with"
        self.told = told

    def run(self, q: torch.Tensor, paged_kv_cache: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._run(q, paged_kv_cache, list(range(len(self.buffers[2]) + 1)), out)


def _told(heads: int, kv_heads: int, head_dim: int, page_size: int, q_type: Any, kv_type: Any) -> dict[str, Any]:
    assert heads % kv_heads == 0 and head_dim in (64, 128, 256)
    kv_type = q_type if kv_type is None else kv_type
    assert {q_type, kv_type} <= {torch.bfloat16, torch.float16}
    return {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size,
        "q_type": q_type, "kv_type": kv_type,
    }  # fmt: skip
