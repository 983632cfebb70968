"""Generation under Megatron: what the exported model generates, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from kit.contexts import contexts_of  # noqa: E402
from kit.distributed import run_distributed  # noqa: E402
from kit.exported import UNEVEN, megatron_logits, twins  # noqa: E402
from kit.tiny import tiny_config, token_batch  # noqa: E402
from kit.tiny_qwen3 import write_byte_tokenizer  # noqa: E402
from transformers import TopPLogitsWarper  # noqa: E402
from transformers.generation import stopping_criteria  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model import generation  # noqa: E402
from megatron_hydra.model.generation import Sampling, generate, likeliest  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.selection.cost import cache_bytes_per_token, state_bytes  # noqa: E402
from megatron_hydra.selection.shape import ModelShape  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402

LENGTHS = (20, 13, 3)


@pytest.fixture(scope="module")
def hybrid():
    return twins(UNEVEN)


def _prompts(batch=3, length=20):
    return token_batch(tiny_config(), batch, length)[0]


def _exported(model, tokens, lengths, num_new_tokens):
    """What transformers generates greedily of right-padded prompts, which it wants on the left."""
    b, t = tokens.shape
    left, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        left[row, t - length :] = tokens[row, :length]
        mask[row, t - length :] = 1
    options = dict(max_new_tokens=num_new_tokens, do_sample=False, pad_token_id=0)
    found = model.generate(left, attention_mask=mask, **options)[:, t:]
    assert found.shape == (b, num_new_tokens) and len(found.unique()) > 5, "too dull to compare"
    return found


@pytest.mark.parametrize("lengths", [(20, 20, 20), LENGTHS], ids=str)
def test_greedy_tokens_are_the_exported_models(hybrid, lengths):
    model, exported = hybrid
    tokens = _prompts()
    expected = _exported(exported, tokens, lengths, 40)
    assert torch.equal(generate(model, tokens, 40, lengths=lengths), expected)


def test_what_follows_a_prompt_does_not_depend_on_the_padding(hybrid):
    model, _ = hybrid
    tokens = _prompts()
    expected = generate(model, tokens, 10, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = 7
    assert torch.equal(generate(model, tokens, 10, lengths=LENGTHS), expected)


def test_a_row_that_has_ended_has_nothing_but_the_end(hybrid):
    model, _ = hybrid
    tokens = _prompts()
    free = generate(model, tokens, 30, lengths=LENGTHS)
    end = int(free[1, 4])
    ended = generate(model, tokens, 30, lengths=LENGTHS, end_token=end)
    for whole, cut in zip(free.tolist(), ended.tolist(), strict=True):
        place = whole.index(end) if end in whole else len(whole)
        assert cut == whole[:place] + [end] * (len(whole) - place)
    alone = generate(model, tokens[1:2, :13], 30, end_token=end)  # all rows end before the last
    assert torch.equal(alone, ended[1:2])


def test_sampled_tokens_have_the_models_distribution():
    """Of the first token, many rows of one prompt: frequencies against the logits' softmax."""
    model, _ = twins(UNEVEN)
    prompt = _prompts(1, 9)
    num_rows, temperature, top_p = 4000, 1.5, 0.8
    sampling = Sampling(temperature, top_p, seed=3)
    found = generate(model, prompt.expand(num_rows, -1), 1, sampling=sampling).flatten()
    logits = megatron_logits(model, prompt)[:, -1] / temperature
    expected = TopPLogitsWarper(top_p)(prompt, logits).softmax(-1)[0]
    assert 2 < (expected > 0).sum() < len(expected), "top_p must leave some out"
    counts = found.bincount(minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    deviation = (counts - num_rows * expected).abs()
    assert (deviation <= 5 * (num_rows * expected * (1 - expected)).sqrt()).all()


def test_a_seed_repeats_its_tokens_and_leaves_the_global_generator_alone(hybrid):
    model, _ = hybrid
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (
        generate(model, _prompts(), 20, sampling=Sampling(seed=seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.77, 1.0])
def test_likeliest_tokens_are_those_of_transformers(top_p):
    logits = 2 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(-1)
    found = likeliest(logits.softmax(-1), top_p)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_beyond_its_length_a_model_goes_on_and_says_so(hybrid, caplog, monkeypatch):
    """Once, before the first token; from as many tokens on as transformers reminds of its limit."""
    model, exported = hybrid
    limit, reminders = exported.config.max_position_embeddings, []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", reminders.append)
    monkeypatch.setattr(generation, "_generate", lambda *_: caplog.messages[:])
    message = (
        f"generation goes on beyond the {limit} tokens (seq_length) that the model is built for"
    )
    tokens = _prompts(2, limit - 4)
    for num_new_tokens, lengths in ((5, None), (9, (limit - 8, 3)), (6, None), (6, (limit - 4, 3))):
        t = max(lengths or (limit - 4,))
        reminders.clear(), caplog.clear(), generation._warn_once.cache_clear()
        exported.generate(tokens[:, :t], max_new_tokens=num_new_tokens, do_sample=False)
        said = generate(model, tokens[:, :t], num_new_tokens, lengths=lengths)
        assert said == [message] * bool(reminders)
        assert bool(reminders) == (num_new_tokens == 6)
    caplog.clear()
    assert generate(model, tokens, 30) == [], "once"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_new_tokens": 0}, "num_new_tokens is 0; it must be 1 or more"),
        ({"lengths": (3, 4)}, r"lengths is \[3, 4\]; 3 numbers are needed"),
        ({"lengths": (3, 0, 4)}, "each from 1 to 20"),
        ({"tokens": torch.ones(3, 4)}, r"tokens is torch.float32 \(3, 4\); integers"),
        ({"tokens": torch.full((3, 4), 64)}, "ids from 64 to 64; the vocabulary's are 0 to 63"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(hybrid, arguments, message):
    options = {"tokens": _prompts(), "num_new_tokens": 2, **arguments}
    with pytest.raises(UserError, match=message):
        generate(hybrid[0], **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be above 0, and at most 1"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
    ids=str,
)
def test_bad_sampling_is_named(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def test_other_models_are_named(hybrid):
    message = "needs the GPTModel of a hybrid or its teacher without wrappers, got"
    with pytest.raises(UserError, match=f"{message} Sequential"):
        generate(torch.nn.Sequential(hybrid[0]), _prompts(), 1)
    with pytest.raises(UserError, match=f"{message} HydraForCausalLM"):
        generate(hybrid[1], _prompts(), 1)


VOCABULARY = 265  # not divisible by two ranks
FA_HEADS = {0: (), 1: (5,), 2: (0, 1, 3, 4, 5), 3: tuple(range(8))}
OTHER_KINDS = {1: {"kda": (0, 3), "sliding_window": (1,)}, 2: {"sliding_window": (2, 6)}}
PLAN = HeadPlan.from_fa_heads(FA_HEADS, 4, 8, 4, other_kinds=OTHER_KINDS)
"""A layer without FA heads, one with FA heads on one rank alone, one whose groups two ranks share
if heads are placed by type, and one of FA heads alone."""
RANK_PROMPTS = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.dist
def test_two_ranks_generate_what_the_exported_model_does(tmp_path):
    """Catches: states of another rank's heads; logits of one rank's vocabulary, or with padding."""
    fields: dict[str, Any] = {"num_layers": 4, "vocab_size": VOCABULARY, "fa_rope": True}
    model, exported = twins(PLAN, **fields)
    save_checkpoint(tmp_path / "one", model, model.config, PLAN, *_tokenizer(tmp_path))
    torch.save(_exported(exported, RANK_PROMPTS, LENGTHS, 30), tmp_path / "expected.pt")
    sampled = generate(model, RANK_PROMPTS, 10, sampling=Sampling(seed=1))
    torch.save(sampled, tmp_path / "sampled.pt")
    run_distributed(_generate_on_ranks, 2, tmp_path)


def _tokenizer(folder: Path) -> tuple[Path, dict[str, Any]]:
    write_byte_tokenizer(folder / "tokenizer")
    return folder / "tokenizer", {}


def _generate_on_ranks(folder: Path) -> None:
    initialize_model_parallel(2)
    for placement, sequence_parallel in (
        ("balanced", False),
        ("by_type", False),
        ("by_type", True),
    ):
        fields = {"placement": placement, "sequence_parallel": sequence_parallel}
        model = load_checkpoint(folder / "one", **fields).model.eval()
        logits = megatron_logits(model, RANK_PROMPTS)
        placements = [layer.self_attention.placement for layer in model.decoder.layers]
        assert any(len(p.fa_heads(0)) != len(p.fa_heads(1)) for p in placements)
        assert any(p.shares_groups for p in placements) == (placement == "by_type")
        found = generate(model, RANK_PROMPTS, 30, lengths=LENGTHS)
        assert torch.equal(found, torch.load(folder / "expected.pt")), placement
        found = generate(model, RANK_PROMPTS, 10, sampling=Sampling(seed=1))
        assert torch.equal(found, torch.load(folder / "sampled.pt")), placement
        assert model.config.sequence_parallel == sequence_parallel
        assert torch.equal(megatron_logits(model, RANK_PROMPTS), logits), "left as it was"
        num_bytes = torch.tensor(_kept_bytes(model, 5))
        dist.all_reduce(num_bytes)
        assert num_bytes == 3 * _promised_bytes(model, placements, 25), placement


def _kept_bytes(model: torch.nn.Module, num_new_tokens: int) -> int:
    """What this rank's context holds."""
    (context,) = contexts_of(lambda: generate(model, RANK_PROMPTS, num_new_tokens))
    return sum(layer.num_bytes for layer in context.key_value_memory_dict.values())


def _promised_bytes(model: torch.nn.Module, placements: list[Any], num_tokens: int) -> int:
    """The plan's, of a row, and the groups that a second rank keeps too."""
    shape = ModelShape.from_config(model.config)
    kept = sum(len(p.used_groups(rank)) for p in placements for rank in range(2))
    owned = sum(len(p.owned_groups(rank)) for p in placements for rank in range(2))
    of_group = 2 * shape.head_dim * 4
    per_token = cache_bytes_per_token(shape, "fp32").of(PLAN) + (kept - owned) * of_group
    return round(num_tokens * per_token + state_bytes(shape, "fp32").of(PLAN))
