"""transformers on the same weights, beside which gpu.py puts its rows. It needs transformers."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_model import Model, answer, opened, settle

from weft.core.plan import Lane, Plan, Sampling, Slice
from weft.core.sampling import SamplingParams
from weft.devices.cuda_streams import Gpu

# Mean difference of log-probabilities, in their spread: of two random models it is about 1, of BF16 some hundredths
# with one layer, and more with many. Rows have it beside the times.
AGREEMENT = 0.6
PROMPT = 32


class Peer:
    """transformers' Llama as it comes: sdpa, a cache that grows, call by call. Its weights are views of the model's.

    difference: of its log-probabilities and weft's, on average, in their spread."""

    def __init__(self, gpu: Gpu, model: Model, raw: dict[str, Any]) -> None:
        """Raises ImportError without transformers, ValueError where it computes another model."""
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

        self._gpu = gpu
        self._cache: Any = DynamicCache
        config = LlamaConfig(**raw)
        with torch.device("meta"):
            self._model: Any = LlamaForCausalLM(config).eval()
        self._model.load_state_dict(_state(model), strict=True, assign=True)
        with gpu.device:  # its frequencies are no part of a state
            self._model.model.rotary_emb = type(self._model.model.rotary_emb)(config=config)
        self.difference = _difference(gpu, model, self)
        if not self.difference <= AGREEMENT:
            raise ValueError(
                f"its log-probabilities differ by {self.difference:.2f} of their spread on average, more than "
                f"{AGREEMENT}: it computes another model"
            )

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 [len(tokens), V]."""
        return self._model(torch.tensor([tokens], device=self._gpu.device)).logits[0].float()

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> float:
        """Seconds until the first token of a prompt is there."""
        given = torch.tensor([tokens], device=self._gpu.device)
        settle(self._gpu)
        began = time.perf_counter()
        out = self._model(given, past_key_values=self._cache(), use_cache=True, logits_to_keep=1)
        out.logits.argmax(-1).tolist()
        return time.perf_counter() - began

    def decoding(self, batch: int, context: int) -> Decoding:
        return Decoding(self._gpu, self._model, self._cache(), batch, context)


class Decoding:
    """A batch that goes on from `context` random keys and values."""

    @torch.inference_mode()
    def __init__(self, gpu: Gpu, model: Any, cache: Any, batch: int, context: int) -> None:
        self._gpu, self._model, self._cache = gpu, model, cache
        config = model.config
        shape = (batch, config.num_key_value_heads, context, config.head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.empty(shape, dtype=torch.bfloat16, device=gpu.device).normal_() for _ in range(2))
            cache.update(keys, values, layer)
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=gpu.device)

    @torch.inference_mode()
    def steps(self, count: int) -> float:
        """Seconds of so many steps. Nobody waits for a token in between, which flatters."""
        settle(self._gpu)
        began = time.perf_counter()
        for _ in range(count):
            out = self._model(self._tokens, past_key_values=self._cache, use_cache=True)
            self._tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        self._tokens.tolist()
        return time.perf_counter() - began


def _state(model: Model) -> dict[str, torch.Tensor]:
    """transformers' names for what lies in the packed weights."""
    weights, config = model.weights, model.config
    queries, keys, inner = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.intermediate_size
    state = {
        "model.embed_tokens.weight": weights.embedding.values,
        "model.norm.weight": weights.norm,
        "lm_head.weight": weights.head.weight,
    }
    for index, layer in enumerate(weights.layers):
        q, k, v = layer.qkv.weight.split((queries, keys, keys))
        gate, up = layer.gate_up.weight.split(inner)
        parts = {
            "input_layernorm": layer.input_norm,
            "post_attention_layernorm": layer.mlp_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.output.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.down.weight,
        }
        state |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items()}
    return state


def _difference(gpu: Gpu, model: Model, peer: Peer) -> float:
    """Engines that do not compute the same model are not compared in speed."""
    prompt = [1 + (7 * place) % (model.config.vocabulary - 1) for place in range(PROMPT)]
    sampling = Sampling(SamplingParams(temperature=0.0), 0, PROMPT)
    blocks = tuple(range(PROMPT // 16))
    piece = Slice(0, 0, tuple(prompt), blocks, sampling, prompt_logprobs=0)
    with opened(gpu, model, batch=1, length=PROMPT, blocks=len(blocks), tokens=PROMPT) as device:
        ((_, scores),) = answer(device, Plan(0, Lane.MIXED, (piece,))).prompt_scores
    table = peer.logits(prompt).log_softmax(-1)
    following = torch.tensor(prompt[1:], device=table.device)
    theirs = table[:-1].gather(1, following[:, None])[:, 0].cpu()
    ours = torch.tensor([score.logprob for score in scores])
    return ((ours - theirs).abs().mean() / theirs.std()).item()
