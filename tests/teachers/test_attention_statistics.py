"""Recurrent heads that start as their teacher's heads look.

Catches: statistics of another head, layer, row or scale than transformers' attention has, decays
that do not reach as far back as was measured, rows that land on another head or section, values
that are counted twice.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_hydra import cpu

cpu.install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3, write_tiny_teacher  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.teachers import conversion, loading, weights  # noqa: E402
from megatron_hydra.teachers.attention_statistics import (  # noqa: E402
    AttentionStatistics,
    start_from_attention,
)
from megatron_hydra.teachers.calibration import measure_heads  # noqa: E402
from megatron_hydra.teachers.weight_reuse import reuse_teacher_weights  # noqa: E402

LAYERS, HEADS, LENGTH = 2, 4, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    initialize_model_parallel()
    return write_tiny_qwen3(tmp_path_factory.mktemp("teacher"), initializer_range=0.5)


def _of_transformers(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m `[layers, heads]`, r `[layers, heads, b, s - 1]` and inputs `[layers, b, s - 1, h]`.

    Token by token, in float64, from the attention that transformers returns.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, __, x: inputs.append(x[:, 1:]))
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    distance = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    ratio = torch.zeros(LAYERS, HEADS, len(tokens), LENGTH - 1, dtype=torch.float64)
    for layer, attention in enumerate(attentions):
        for head in range(HEADS):
            for row in range(len(tokens)):
                looks = attention[row, head, 1:, 1:]
                looks = looks / looks.sum(-1, keepdim=True)
                n = len(looks)
                back = [
                    sum(float(looks[i, j]) * (i - j) for j in range(i + 1))
                    for i in range(n // 2, n)
                ]
                m = sum(back) / len(back)
                distance[layer, head] += m / len(tokens)
                gamma = m / (1 + m)
                for j in range(n):
                    expected = sum(
                        gamma ** (i - j) / sum(gamma**k for k in range(i + 1)) for i in range(j, n)
                    )
                    found = math.log(float(looks[j:, j].sum()) / expected)
                    ratio[layer, head, row, j] = min(max(found, -3.0), 3.0)
    return distance, ratio, torch.stack(inputs)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_statistics_are_those_of_transformers_attention(tmp_path: Path, family: str) -> None:
    initialize_model_parallel()
    folder = write_tiny_teacher(tmp_path, family)
    tokens = torch.randint(0, 257, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    distance, ratio, inputs = _of_transformers(folder, tokens)
    config, source = loading.hydra_config(folder), weights.TeacherWeights(folder)
    batches = tokens.split((2, 1))
    found = measure_heads(config, source, batches, range(LAYERS), rms=True, attention=True)[1]
    torch.testing.assert_close(found.distance.double(), distance, rtol=0, atol=4e-5)
    assert distance.flatten().sort().values.diff().min() > 2e-4, "else heads could be exchanged"
    for layer in range(LAYERS):
        x, r = inputs[layer].flatten(0, 1), ratio[layer].flatten(1).T
        # Least squares with a penalty: as many more equations, x = 0 of each channel.
        penalty = (0.1 * x.square().mean() * len(x)) ** 0.5 * torch.eye(x.shape[1])
        expected = torch.linalg.lstsq(
            torch.cat((x, penalty.double())),
            torch.cat((r - r.mean(0), torch.zeros(x.shape[1], HEADS, dtype=torch.float64))),
        ).solution.T
        torch.testing.assert_close(found.write[layer].double(), expected, rtol=1e-3, atol=1e-4)


def _started(folder: Path, **fields: Any) -> tuple[Any, AttentionStatistics, Any]:
    plan = HeadPlan.from_fa_heads({0: [1, 2], 1: []}, LAYERS, HEADS, 2)
    config = loading.hydra_config(folder, **fields)
    model = build_model(config, plan)
    tensors = conversion.tensors_by_head(config, weights.read_weights(folder))
    summary = reuse_teacher_weights(model, tensors)
    total = summary.new.total() + summary.reused.total()
    rng = torch.Generator().manual_seed(0)
    statistics = AttentionStatistics(
        0.5 + 9 * torch.rand(LAYERS, HEADS, generator=rng),
        torch.randn(LAYERS, HEADS, config.hidden_size, generator=rng),
    )
    start_from_attention(model, statistics, summary)
    assert summary.new.total() + summary.reused.total() == total
    return model, statistics, summary


@pytest.mark.parametrize("kind", ["gated_delta_net", "kda"])
@torch.no_grad()
def test_heads_forget_as_far_back_as_was_measured(folder: Path, kind: str) -> None:
    """The decay that a layer computes of any input, as the mean distance that it remembers."""
    model, statistics, summary = _started(folder, la_kind=kind)
    for index, heads in enumerate(([0, 3], [0, 1, 2, 3])):
        attention = model.decoder.layers[index].self_attention
        (mixer,) = (m for m in attention.mixers() if m.kind == kind)
        hidden = torch.randn(5, 1, model.config.hidden_size)
        sections = attention.layout.split(attention.in_proj(hidden)[0])
        a = sections[f"{mixer.prefix}_decay"]
        if kind == "kda":
            log_decay = mixer._log_decay({"decay": a}, a[..., 0])
        else:
            rate = torch.nn.functional.softplus(a + mixer.dt_bias)
            log_decay = (-mixer.A_log.exp() * rate).unsqueeze(-1)
        gamma = log_decay.exp()
        expected = statistics.distance[index, heads][None, None, :, None].expand_as(gamma)
        torch.testing.assert_close(gamma / (1 - gamma), expected, rtol=1e-4, atol=1e-4)
        b = sections[f"{mixer.prefix}_beta"]
        torch.testing.assert_close(b, hidden @ statistics.write[index, heads].T)
    assert summary.reused["decays and write strengths (teacher's attention)"]


def test_kinds_without_such_values_stay_as_they_are(folder: Path) -> None:
    _, _, summary = _started(folder, la_kind="sliding_window", sliding_window_tokens=4)
    assert not summary.reused["decays and write strengths (teacher's attention)"]
    _, _, summary = _started(folder, la_decay=False, la_beta=False)
    assert not summary.reused["decays and write strengths (teacher's attention)"]


def test_the_command_says_what_it_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HeadPlan.from_fa_heads({0: [1, 2]}, LAYERS, HEADS, 2).save(tmp_path / "plan.json")
    words = ["convert", "--teacher", str(folder), "--plan", str(tmp_path / "plan.json")]
    words += ["--out", str(tmp_path / "hybrid"), "--calibration-tokens", "48"]
    words += ["--calibration-length", "24", "--calibrate-recurrence"]
    assert cli.main(words) == 0
    assert "decays and write strengths (teacher's attention)" in capsys.readouterr().out
    record = json.loads((tmp_path / "hybrid/model.json").read_text())
    assert record["provenance"]["calibrated_recurrence"] is True
    for more, message in (
        (["--calibration-tokens", "0"], "needs calibration tokens"),
        (["--calibration-length", "15"], "how far back heads look is measured on 16 or more"),
        (["--reuse", "nothing"], "needs a plan, and reuse to be all"),
    ):
        assert cli.main([*words, "--overwrite", *more]) == 2
        assert message in capsys.readouterr().err
