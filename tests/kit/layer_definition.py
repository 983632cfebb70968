"""The hybrid layer in float64, a head and a token at a time: what its forward pass must equal."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def by_definition(attention, x, rotary):
    """The layer in float64, one head and one token at a time, from `method.md`'s equations."""
    config, placement = attention.config, attention.placement
    weight = attention.in_proj.weight.double()

    def project(section, unit):
        return x @ weight[attention.layout.rows(section, unit)].t()  # [s, b, d]

    heads = []
    for head, kind in enumerate(placement.layer_plan.kinds):
        if kind == "fa":
            query = project("fa_query", head)
            key, value = project("fa_key", head // 2), project("fa_value", head // 2)
            out = _fa_head(attention, query, key, value, rotary)
            if config.fa_output_gate:
                gate = 2 * project("fa_gate", head).sigmoid()
        elif kind == "sliding_window":
            parts = [project(f"window_{name}", head) for name in ("query", "key", "value")]
            out = _window_head(attention, head, *parts, rotary)
            if config.fa_output_gate:
                gate = 2 * project("window_gate", head).sigmoid()
        else:
            prefix = {"gated_delta_net": "la", "kda": "kda"}[kind]
            parts = [project(f"{prefix}_{name}", head) for name in ("query", "key", "value")]
            decay, beta = (
                project(f"{prefix}_{name}", head) if getattr(config, f"la_{name}") else None
                for name in ("decay", "beta")
            )
            out = _la_head(attention, kind, head, parts, decay, beta, rotary)
            if config.la_output_gate != "none":
                z = project(f"{prefix}_gate", head)
                gate = F.silu(z) if config.la_output_gate == "silu" else 2 * z.sigmoid()
        if config.fusion != "none":
            out = out / (out.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
        is_softmax = kind in ("fa", "sliding_window")
        gated = config.fa_output_gate if is_softmax else config.la_output_gate != "none"
        out = out * gate if gated else out
        if config.fusion == "scale":
            out = out * attention.fusion.head_scale[head].double()
        heads.append(out)
    return torch.cat(heads, -1) @ attention.linear_proj.weight.double().t()


def _norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def _rotate(x, rotary):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * rotary[:, 0].cos() + turned * rotary[:, 0].sin()


def _fa_head(attention, query, key, value, rotary):
    config, branch = attention.config, attention.full_attention
    query, key = _norm(query, branch.q_layernorm), _norm(key, branch.k_layernorm)
    if config.fa_query_scale == "always":
        for t in range(len(query)):
            query[t] *= math.log(t + config.fa_query_scale_base, config.fa_query_scale_base)
    if config.fa_rope:
        query, key = _rotate(query, rotary), _rotate(key, rotary)
    out = torch.zeros_like(value)
    for t in range(len(query)):
        scores = (query[t] * key[: t + 1]).sum(-1) / math.sqrt(query.shape[-1])  # [t, b]
        out[t] = (scores.softmax(0).unsqueeze(-1) * value[: t + 1]).sum(0)
    return out


def _window_head(attention, head, query, key, value, rotary):
    config, branch = attention.config, attention.sliding_window_attention
    query, key = _norm(query, branch.q_layernorm), _norm(key, branch.k_layernorm)
    query, key = _rotate(query, rotary), _rotate(key, rotary)
    sink = branch.sink[branch.heads.index(head)].double() if config.sliding_window_sink else None
    out = torch.zeros_like(value)
    for t in range(len(query)):
        seen = slice(max(0, t - config.sliding_window_tokens + 1), t + 1)
        scores = (query[t] * key[seen]).sum(-1) / math.sqrt(query.shape[-1])  # [tokens, b]
        total = scores.exp().sum(0) + (0.0 if sink is None else sink.exp())
        out[t] = ((scores.exp() / total).unsqueeze(-1) * value[seen]).sum(0)
    return out


def _la_head(attention, kind, head, parts, decay, beta, rotary):
    name = {"gated_delta_net": "linear_attention", "kda": "kimi_delta_attention"}[kind]
    config, branch = attention.config, getattr(attention, name)
    n, d = len(branch.heads), config.kv_channels
    index = branch.heads.index(head)
    if config.la_short_conv:
        taps = branch.conv_weight.double().view(3, n, d, -1)[:, index]
        parts = [_convolve(part, tap) for part, tap in zip(parts, taps, strict=True)]
    query, key, value = parts
    if config.la_qk_norm:
        query, key = _norm(query, branch.q_layernorm), _norm(key, branch.k_layernorm)
    if config.la_rope:
        query, key = _rotate(query, rotary), _rotate(key, rotary)
    query, key = (t / t.norm(dim=-1, keepdim=True) for t in (query, key))
    state = torch.zeros(query.shape[1], d, d, dtype=torch.float64)  # [b, d_k, d_v]
    out = torch.zeros_like(value)
    for t in range(len(query)):
        if decay is not None:
            raw, bias = decay[t], branch.dt_bias[index].double()
            if kind == "kda":  # a number per channel, [b, d]
                raw = raw @ branch.decay_up.double().view(n, d, -1)[index].t()
                bias = branch.dt_bias.double().view(n, d)[index]
            dt = F.softplus(raw + bias)  # [b, 1]
            state = state * torch.exp(-branch.A_log[index].double().exp() * dt).unsqueeze(-1)
        strength = beta[t].sigmoid() if beta is not None else torch.ones_like(key[t, :, :1])
        error = value[t] - torch.einsum("bkv,bk->bv", state, key[t])
        state = state + torch.einsum("bk,bv->bkv", key[t], strength * error)
        out[t] = torch.einsum("bkv,bk->bv", state, query[t]) / math.sqrt(d)
    return out


def _convolve(x, taps):
    size = taps.shape[-1]
    padded = torch.cat((x.new_zeros(size - 1, *x.shape[1:]), x))
    return F.silu(sum(padded[i : i + len(x)] * taps[:, i] for i in range(size)))
