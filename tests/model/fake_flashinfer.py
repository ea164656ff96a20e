"""FlashInfer's two paged wrappers as its documentation has them, in plain PyTorch.

The signatures are those of flashinfer-python 0.7.2 (a test holds them to the package where it is
installed), so a call with a wrong name or order fails here as it would there. What it refuses is
refused here too. ``run`` reads its buffers when it runs, as a kernel in a CUDA graph does.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HEAD_SIZES = (64, 128, 256)
FLOATS = (torch.float16, torch.bfloat16)


def fake_module() -> ModuleType:
    """``log`` of the module takes each wrapper made and each plan, in order."""
    module = ModuleType("flashinfer")
    log: list[tuple[str, Any]] = []
    decode = type("Decode", (BatchDecodeWithPagedKVCacheWrapper,), {"log": log})
    prefill = type("Prefill", (BatchPrefillWithPagedKVCacheWrapper,), {"log": log})
    module.BatchDecodeWithPagedKVCacheWrapper = decode  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = prefill  # type: ignore[attr-defined]
    module.log = log  # type: ignore[attr-defined]
    return module


class _Wrapper:
    log: list[tuple[str, Any]]

    def _start(self, workspace: Tensor, kv_layout: str, buffers: dict[str, Any] | None) -> None:
        assert workspace.dtype == torch.uint8
        assert workspace.data_ptr() % 16 == 0
        assert kv_layout in ("NHD", "HND")
        self.layout, self.device, self.buffers = kv_layout, workspace.device, buffers
        if buffers is not None:
            assert all(isinstance(each, Tensor) for each in buffers.values())
            assert len(buffers["starts"]) == len(buffers["last"]) + 1
        self.log.append((type(self).__name__, self))

    def _plan(
        self,
        queries: Tensor | None,
        starts: Tensor,
        indices: Tensor,
        last: Tensor,
        shape: tuple[int, int, int, int],
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype | None,
        sm_scale: float | None,
        window_left: int,
        causal: bool,
    ) -> None:
        assert all(each.dtype == torch.int32 for each in (starts, indices, last))
        assert starts.device.type == last.device.type == "cpu", "read on the host"
        assert len(starts) == len(last) + 1
        assert starts[0] == 0
        assert int(starts[-1]) == len(indices)
        lengths = starts.diff()
        heads, kv_heads, head_size, page_size = shape
        assert bool((lengths >= 1).all())
        assert bool(((last >= 1) & (last <= page_size)).all())
        assert heads % kv_heads == 0
        assert head_size in HEAD_SIZES
        assert q_data_type in FLOATS
        assert kv_data_type in (None, q_data_type, torch.float8_e4m3fn)
        if self.buffers is None:
            self.queries = queries
            self.starts, self.indices, self.last = starts.clone(), indices.clone(), last.clone()
        else:
            if len(last) != len(self.buffers["last"]):
                raise ValueError("The batch size should be fixed in cudagraph mode")
            if len(indices) > len(self.buffers["indices"]):
                raise ValueError("The size of indices should be less than the allocated buffer")
            self.queries = None
            self.starts, self.indices, self.last = (
                self.buffers[name] for name in ("starts", "indices", "last")
            )
            self.starts.copy_(starts)
            self.last.copy_(last)
            self.indices[: len(indices)].copy_(indices)
        self.num_queries = len(last) if queries is None else int(queries[-1])
        self.shape, self.dtype, self.pages = shape, q_data_type, kv_data_type or q_data_type
        self.scale = 1 / math.sqrt(head_size) if sm_scale is None else sm_scale
        self.window_left, self.causal = window_left, causal
        self.log.append(("plan", self))

    def _run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], out: Tensor | None) -> Tensor:
        keys, values = paged_kv_cache
        heads, kv_heads, head_size, page_size = self.shape
        if q.dtype != self.dtype:
            raise ValueError(f"The dtype of q {q.dtype} does not match the q_data_type")
        if keys.dtype != self.pages:
            raise ValueError(f"The dtype of k {keys.dtype} does not match the kv_data_type")
        assert q.shape[1:] == (heads, head_size)
        assert q.stride(-1) == 1
        axes = (kv_heads, page_size) if self.layout == "HND" else (page_size, kv_heads)
        assert keys.shape[1:] == values.shape[1:] == (*axes, head_size)
        assert keys.stride() == values.stride()
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        assert out.shape == q.shape
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        if self.layout == "NHD":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        queries = self.queries
        if queries is None:
            queries = torch.arange(len(self.last) + 1, dtype=torch.int32)
        assert len(q) == self.num_queries, "q must have the rows that were planned"
        limits = (self.scale, self.window_left, self.causal)
        kernel(q, keys, values, queries, self.starts, self.indices, self.last, *limits, out)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
        jit_args=None,
    ):
        assert backend in ("auto", "fa2")
        self.use_tensor_cores = use_tensor_cores
        buffers = {
            "starts": paged_kv_indptr_buffer,
            "indices": paged_kv_indices_buffer,
            "last": paged_kv_last_page_len_buffer,
        }
        self._start(float_workspace_buffer, kv_layout, buffers if use_cuda_graph else None)

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        window_left=-1,
        window_right=0,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        data_type=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        non_blocking=True,
        block_tables=None,
        seq_lens=None,
        fixed_split_size=None,
        disable_split_kv=False,
        q_len_per_req=1,
        is_causal=None,
    ):
        group = num_qo_heads // num_kv_heads
        assert self.use_tensor_cores or group in (1, 2, 3, 4, 6, 8, 16)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan(
            *(None, indptr, indices, last_page_len, shape),
            *(q_data_type, kv_data_type, sm_scale, window_left, False),
        )

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        enable_pdl=None,
        window_left=None,
        sinks=None,
        q_len_per_req=None,
        skip_softmax_threshold_scale_factor=None,
        kv_cache_sf=None,
    ):
        return self._run(q, paged_kv_cache, out)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
        variant_owns_mask=False,
    ):
        assert not use_cuda_graph, "chunks run eagerly"
        self._start(float_workspace_buffer, kv_layout, None)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
        prefix_len_ptr=None,
        token_pos_in_items_ptr=None,
        token_pos_in_items_len=0,
        max_item_len_ptr=None,
        seq_lens=None,
        seq_lens_q=None,
        block_tables=None,
        max_token_per_sequence=None,
        max_sequence_kv=None,
        fixed_split_size=None,
        disable_split_kv=False,
        uniform_q_len=None,
    ):
        assert qo_indptr.dtype == torch.int32
        assert qo_indptr.device.type == "cpu"
        assert len(qo_indptr) == len(paged_kv_indptr)
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._plan(
            *(qo_indptr.clone(), paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, shape),
            *(q_data_type, kv_data_type, sm_scale, window_left, causal),
        )

    def run(
        self,
        q,
        paged_kv_cache,
        *args,
        q_scale=None,
        k_scale=None,
        v_scale=None,
        out=None,
        lse=None,
        return_lse=False,
        lse_base="log2",
        lse_layout="NH",
        enable_pdl=None,
        window_left=None,
        sinks=None,
        kv_cache_sf=None,
        skip_softmax_threshold_scale_factor=None,
        use_fp16_softmax=None,
        uses_spcompress=None,
    ):
        return self._run(q, paged_kv_cache, out)


@torch.library.custom_op("pronk_tests::flashinfer_kernel", mutates_args=("out",))
def kernel(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    starts: Tensor,
    indices: Tensor,
    last: Tensor,
    scale: float,
    window_left: int,
    causal: bool,
    out: Tensor,
) -> None:
    """One operation, as it is on a GPU, so that a recorded launch reads the buffers anew."""
    page_size = keys.size(2)
    for row in range(len(last)):
        first, end = int(queries[row]), int(queries[row + 1])
        pages = indices[int(starts[row]) : int(starts[row + 1])].long()
        context = (len(pages) - 1) * page_size + int(last[row])
        k, v = (
            pool[pages].float().transpose(0, 1).flatten(1, 2)[:, :context]
            for pool in (keys, values)
        )
        group = q.size(1) // k.size(0)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = q[first:end].float().transpose(0, 1) @ k.mT * scale
        place = torch.arange(context - (end - first), context).unsqueeze(1)
        keyed = torch.arange(context)
        hidden = (keyed > place) if causal else torch.zeros(end - first, context, dtype=torch.bool)
        if window_left >= 0:
            hidden = hidden | (keyed < place - window_left)
        shares = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[first:end] = (shares @ v).transpose(0, 1).to(out.dtype)
