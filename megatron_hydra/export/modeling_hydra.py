"""A head-level hybrid as a transformers model: batched, with a cache of what its heads keep.

Copied into every exported folder: imports PyTorch and transformers alone.

Legend: b rows, t tokens, h hidden size, n heads of all kinds, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.generation import CompileConfig, GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .cache_hydra import HydraCache, HydraLayerCache, check_cache
from .configuration_hydra import KINDS, HydraHeadConfig
from .mixers_hydra import MIXERS, HydraRMSNorm, Mixer, normed, rearranged
from .recording_hydra import RecordedSteps, cuda_graph

# Unused here: transformers 4 copies from a folder the files alone that this one names.
from .recurrence_hydra import gated_delta_rule  # noqa: F401
from .stream_hydra import CACHE, Stream, padded_mask, stream_of

FLOAT32 = ("A_log", "dt_bias", "head_scale", "gate_weight", "sink")
"""Parameters that are few and change outputs much: float32 as they were trained, in any model."""


class HydraAttention(nn.Module):
    """Heads of several kinds, fused in the teacher's order (arXiv 2606.20097, Eq 13-14)."""

    def __init__(self, config: HydraHeadConfig, layer: int) -> None:
        super().__init__()
        self.config, n = config, config.num_attention_heads
        self.mixer_names, by_kind = [], []
        for kind in KINDS:
            heads = config.heads_of(layer, kind)
            if heads:
                mixer = MIXERS[kind](config, layer, heads)
                self.add_module(mixer.name, mixer)
                self.mixer_names.append(mixer.name)
                by_kind += heads
        self.order = tuple(by_kind.index(head) for head in range(n))
        self.o_proj = nn.Linear(n * config.head_dim, config.hidden_size, bias=False)
        if config.fusion in ("scale", "gate"):
            self.head_scale = nn.Parameter(torch.ones(n))
        if config.fusion == "gate":
            self.gate_weight = nn.Parameter(torch.zeros(2, config.hidden_size))

    def forward(self, x: Tensor, stream: Stream, cache: HydraLayerCache | None) -> Tensor:
        """`[b, t, h]` to the same."""
        packed = (stream.pack(x), stream.packed()) if stream.order is not None else (x, stream)
        outputs = []
        for name in self.mixer_names:
            mixer = getattr(self, name)
            if mixer.has_state:
                outputs.append(stream.unpack(self._gated(mixer, *packed, cache)))
            else:
                outputs.append(self._gated(mixer, x, stream, cache))
        if self.config.fusion == "gate":
            # Twice a softmax over full attention and the others: both start at 1.
            weights = 2.0 * F.linear(x.float(), self.gate_weight.float()).softmax(dim=-1)
            first, others = weights.to(x.dtype)[:, :, :, None, None].unbind(2)
            outputs = [
                output * (first if name == "fa" else others)
                for name, output in zip(self.mixer_names, outputs, strict=True)
            ]
        heads = rearranged(torch.cat(outputs, dim=2), self.order, dim=2)
        if self.config.fusion in ("scale", "gate"):
            heads = heads * self.head_scale.to(heads.dtype)[:, None]
        if cache is not None:
            cache.advance(x.shape[1], x.device)
        return self.o_proj(heads.flatten(2))

    def _gated(
        self, mixer: Mixer, x: Tensor, stream: Stream, cache: HydraLayerCache | None
    ) -> Tensor:
        """A kind's outputs `[b, t, its heads, d]`, normed and gated."""
        output, gate = mixer(x, stream, cache), mixer.gate(x)
        if self.config.fusion != "none":
            output = normed(output, self.config.rms_norm_eps)
        return output if gate is None else output * gate


class HydraMLP(nn.Module):
    """The teacher's gated MLP."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__()
        h, wide = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(h, wide, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(wide, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HydraDecoderLayer(GradientCheckpointingLayer):
    """A layer as the teacher's, with heads of several kinds."""

    def __init__(self, config: HydraHeadConfig, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self.self_attn = HydraAttention(config, layer)
        self.mlp = HydraMLP(config)
        self.input_layernorm = HydraRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = HydraRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, stream: Stream, past_key_values: HydraCache | None = None
    ) -> Tensor:
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        x = x + self.self_attn(self.input_layernorm(x), stream.to(x.device), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class HydraPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config_class = HydraHeadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HydraDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Transformers' own, which warns and draws weights at random where the folder lacks them.

        Raises:
            ValueError: If weights are missing, or of other sizes than the configuration's heads.
        """
        kwargs["ignore_mismatched_sizes"] = True  # they are told of below
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        others = sorted(each[0] for each in info["mismatched_keys"])
        if lacking := [*sorted(info["missing_keys"]), *others]:
            raise ValueError(
                f"the weights are not of this configuration: {len(lacking)} of its tensors, as "
                f"{lacking[0]}, are missing or of another size"
            )
        return (model, info) if output_loading_info else model

    def _finish(self) -> None:
        """Last of construction: what stays float32 is named, as far as the model has it."""
        # A state cannot be taken back, as assisted decoding asks.
        kinds = {kind for layer in self.config.head_kinds for kind in layer}
        self._is_stateful = kinds != {"fa"}
        names = {name.rpartition(".")[2] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = [name for name in FLOAT32 if name in names]
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Transformers else looks for its own words in this file."""
        return True

    def _init_weights(self, module: nn.Module) -> None:
        """New weights, as Gated DeltaNet's code and Megatron start them."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, HydraRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, HydraAttention):
            if hasattr(module, "head_scale"):
                nn.init.ones_(module.head_scale)
            if hasattr(module, "gate_weight"):
                nn.init.zeros_(module.gate_weight)
        elif isinstance(module, Mixer):
            self._init_mixer(module, std)

    def _init_mixer(self, module: Mixer, std: float) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "A_log":
                    parameter.uniform_(1.0, 16.0).log_()
                elif name == "dt_bias":
                    dt = parameter.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
                    parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
                elif name == "decay_up":
                    parameter.normal_(0.0, std)
                else:  # a sink, or a convolution that passes tokens on
                    parameter.zero_()
                    if name == "conv_weight":
                        parameter[:, -1] = 1.0


class HydraModel(HydraPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HydraDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = HydraRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._finish()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HydraCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: HydraCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As :meth:`HydraForCausalLM.forward`, to hidden states `[b, t, h]`."""
        past_key_values = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is asked for; a hybrid returns no attention weights"
            )
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if past_key_values is not None:
                raise ValueError(
                    "gradient checkpointing runs each layer again, which a cache would count as "
                    f"more tokens: give no {CACHE}, or call model.eval()"
                )
            use_cache = False
        if past_key_values is None and use_cache:
            past_key_values = HydraCache(self.config)
        if past_key_values is not None:
            check_cache(past_key_values, self.config)
        stream = stream_of(
            self.config, x, attention_mask, position_ids, past_key_values, self.training
        )
        states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x)
            # Not by a name, by which some releases of transformers take it out in training.
            x = layer(x, stream, past_key_values)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            **{CACHE: past_key_values if use_cache else None},
        )


class HydraForCausalLM(HydraPreTrainedModel, GenerationMixin):
    """A hybrid with its output layer: what generates."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HydraHeadConfig) -> None:
        super().__init__(config)
        self.model = HydraModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._finish()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HydraCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: HydraCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next tokens.

        Args:
            input_ids: `[b, t]`, int64; after a cache's tokens only the new ones.
            attention_mask: `[b, tokens]`, 1 for real tokens and 0 for padding, of the cache's
                tokens and the new ones; padding may stand anywhere. None for no padding.
            position_ids: `[b, t]`; None counts each row's real tokens.
            past_key_values: What earlier tokens left; changed in place.
            inputs_embeds: `[b, t, h]` in place of `input_ids`.
            labels: `[b, t]`, token ids or -100 for no loss.
            use_cache: Return a cache.
            logits_to_keep: Logits of the last so many tokens, or of these; 0 for all.
            output_hidden_states: Return each layer's input, and the last norm's output; None for
                what the configuration says.
            output_attentions: Refused.
            cache: `past_key_values` in the words of transformers' latest releases.
            **kwargs: Of other models; `num_items_in_batch` goes to the loss, `return_dict=False`
                asks for a tuple.

        Raises:
            ValueError: For a cache of another model or kind, or where gradient checkpointing would
                fill it twice, a mask of another shape, or attention weights.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values if cache is None else cache,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            return_dict=True,
        )
        kept: Any = logits_to_keep
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
        if labels is not None:
            options = {k: kwargs[k] for k in ("num_items_in_batch",) if k in kwargs}
            loss = self.loss_function(logits, labels, self.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Transformers' own; on one GPU, if nobody says how to compile, steps are recorded whole.

        For one `generate`, as transformers asks for it: later ones may find other weights. A
        module's hooks would not be called again, so that nothing is recorded where there are some.
        """
        devices = {parameter.device for parameter in self.parameters()}
        has_hooks = any(each._forward_hooks or each._forward_pre_hooks for each in self.modules())
        is_one_gpu = len(devices) == 1 and self.device.type == "cuda"
        if compile_config is not None or has_hooks or not is_one_gpu:
            found: Callable[..., Any] = super().get_compiled_call(compile_config)
            return found
        call = super().get_compiled_call(CompileConfig(mode="default"))
        return RecordedSteps(call, partial(cuda_graph, device=self.device))

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Transformers' own, which looks for `inputs_embeds` here; positions are counted here."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("attention_mask") is not None:
            inputs.pop("position_ids", None)
        return inputs

    def create_masks_for_generate(
        self, config: Any, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """Of a static cache: the mask itself, at every step as wide as the cache."""
        cache = kwargs.get(CACHE)
        embeddings = kwargs.get("inputs_embeds", kwargs.get("input_embeds"))
        if attention_mask is None or cache is None or not cache.takes_step(embeddings.shape[1]):
            return attention_mask
        return padded_mask(attention_mask, cache.max_length)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Our cache where transformers would make its own."""
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "dynamic_full", "static"):
            raise ValueError(
                f"cache_implementation is {wanted!r}; a hybrid has a dynamic and a static cache"
            )
        is_given = model_kwargs.get(CACHE) is not None
        if is_given and wanted is not None:
            raise ValueError(
                f"{CACHE} and cache_implementation={wanted!r} were both given; one of them decides"
            )
        if generation_config.use_cache is not False and not is_given:
            # The last argument in every release.
            length = kwargs.get("max_cache_length", args[-1] if args else None)
            length = max(length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE] = HydraCache(self.config, length if wanted == "static" else None)
