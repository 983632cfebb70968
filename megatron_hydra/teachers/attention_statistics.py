"""How far back a teacher's heads look and what they look at: where recurrent heads may start from.

A hybrid's decays and write strengths have no counterpart in its teacher, and so start at random,
unless they are measured here. That a teacher's attention tells where they should start is from
Taylor-Calibrate (arXiv 2606.16429); the formulas are ours. With P the causal attention of a head,
token i looking at token j, without the row's first token, on which heads rest that have nothing to
look at:

    m = mean over i of sum_j P_ij (i - j)                          how far back, in tokens
    r_j = log(sum_i P_ij / sum_i K_ij)                             how much more than by distance

K is the attention of a head that forgets by gamma = m / (1 + m) each token, which looks m back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_hydra.teachers.weight_reuse import ReuseSummary

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_LEAST_DISTANCE = 2**-4
_LARGEST_LOG_RATIO = 3.0
_LEAST_SHARE = 1e-3
"""Of what distance alone would give: nothing looks at some tokens at all."""
_RIDGE = 0.1
"""Of the mean square of a channel: some thousand tokens tell little of thousands of channels."""
_MOST_SCORES = 2**26


class AttentionStatistics(NamedTuple):
    """What was measured.

    Attributes:
        distance: `[layers, heads]` float32, m.
        write: `[layers, heads, h]` float32; its product with a layer's normed input is nearest to
            r, less its mean, by ridge regression.
    """

    distance: Tensor
    write: Tensor


class AttentionMeter:
    """What the heads of one layer look at, which hooks add up.

    Args:
        attention: Megatron's own, of the `local` backend.
    """

    def __init__(self, attention: Any) -> None:
        self.hidden: Tensor | None = None
        self.count = 0
        self.sums: dict[str, Any] = {name: 0.0 for name in ("m", "x", "r", "xx", "xr")}
        attention.linear_qkv.register_forward_pre_hook(self._keep_hidden)
        attention.core_attention.register_forward_pre_hook(self._add)

    def _keep_hidden(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self.hidden = inputs[0]

    def _add(self, core: Any, inputs: tuple[Tensor, ...]) -> None:
        query, key = (x.permute(1, 2, 0, 3) for x in inputs[:2])  # [s, b, n, d] -> [b, n, s, d]
        scale = core.softmax_scale or query.shape[-1] ** -0.5
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        at_once = max(1, _MOST_SCORES // query.shape[2] ** 2)
        assert self.hidden is not None
        for row, hidden in enumerate(self.hidden.transpose(0, 1)):
            heads = zip(query[row].split(at_once), key[row].split(at_once), strict=True)
            found = [_look(q.float() * scale, k.float()) for q, k in heads]
            m, r = (torch.cat(parts) for parts in zip(*found, strict=True))
            x = hidden[1:].float()
            self.count += len(x)
            added = {
                "m": m * len(x), "x": x.sum(0), "r": r.sum(1), "xx": x.T @ x, "xr": x.T @ r.T
            }  # fmt: skip
            self.sums = {name: self.sums[name] + value for name, value in added.items()}

    def found(self) -> tuple[Tensor, Tensor]:
        """A layer's :class:`AttentionStatistics`, `[heads]` and `[heads, h]`."""
        x, r, xx, xr = (self.sums[name] / self.count for name in ("x", "r", "xx", "xr"))
        ridge = _RIDGE * xx.diagonal().mean() * torch.eye(len(xx)).to(xx)
        write = torch.linalg.solve(xx + ridge, xr - x[:, None] * r).T
        return (self.sums["m"] / self.count).cpu(), write.cpu()


def _look(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """m `[n]` and r `[n, s - 1]` of one row, of scaled queries and keys `[n, s, d]`."""
    scores = query[:, 1:] @ key[:, 1:].transpose(1, 2)
    place = torch.arange(scores.shape[-1], device=scores.device)
    back = place[:, None] - place
    hidden = back < 0
    attention = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    # A row's first tokens have nothing far to look at.
    m = (attention * back).sum(-1)[:, len(place) // 2 :].mean(1).clamp_min(_LEAST_DISTANCE)
    forgets = (back * (m / (1 + m)).log()[:, None, None]).masked_fill(hidden, float("-inf"))
    by_distance = forgets.softmax(-1).sum(1)
    ratio = attention.sum(1) / by_distance
    return m, ratio.clamp_min(_LEAST_SHARE).log().clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


@torch.no_grad()
def start_from_attention(
    model: GPTModel, statistics: AttentionStatistics, summary: ReuseSummary
) -> None:
    """Let a hybrid's recurrent heads forget and write as their teacher's heads look.

    Args:
        model: The hybrid, or a layer of it, whole on one rank, with its teacher's weights.
        statistics: Of the teacher's same layers.
        summary: Its counts of new values move to those that came from the teacher.
    """
    for index, layer in enumerate(model.decoder.layers):
        attention = layer.self_attention
        for mixer in attention.mixers():
            heads = list(mixer.heads)
            start = mixer.calibrated_start(
                statistics.distance[index, heads], statistics.write[index, heads]
            )
            for name, values in start.parameters.items():
                parameter = getattr(mixer, name)
                parameter.copy_(values.to(parameter).view_as(parameter))
                _count(summary, f"{mixer.module_name}.{name}", parameter.numel())
            for name, rows in start.rows.items():
                for head, values in zip(heads, rows, strict=True):
                    attention.in_proj.weight[attention.layout.rows(name, head)] = values.to(
                        attention.in_proj.weight
                    )
                _count(summary, name, rows.numel())


def _count(summary: ReuseSummary, name: str, number: int) -> None:
    summary.new[name] -= number
    if not summary.new[name]:
        del summary.new[name]
    summary.reused["decays and write strengths (teacher's attention)"] += number
