"""Activation patching: known circuits, the plain loop as oracle, transformers' own activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_hydra import cpu
from megatron_hydra.errors import UserError

cpu.install_if_needed()

from hydra_tools.cli import main  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

from megatron_hydra.config import HydraConfig  # noqa: E402
from megatron_hydra.conversion.qwen3 import config_hash, load_teacher, megatron_fields  # noqa: E402
from megatron_hydra.model import build_model  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.selection import activation_patching  # noqa: E402
from megatron_hydra.selection.activation_patching import (  # noqa: E402
    ActivationPatching,
    head_channels,
    run_with_answer_activations,
)
from megatron_hydra.selection.probes import CounterfactualPair, NeedleSample  # noqa: E402
from megatron_hydra.selection.readout import readout  # noqa: E402
from megatron_hydra.selection.scorer import (  # noqa: E402
    Probe,
    ProbeEffects,
    ScorerResult,
    assemble_scores,
)
from megatron_hydra.selection.scores import HeadScores  # noqa: E402
from megatron_hydra.testing.tiny_qwen3 import write_tiny_qwen3  # noqa: E402

# Vocabulary of the hand-wired models: the digits 0 to 9, a question mark, filler.
QUESTION, FILLER, VOCAB = 10, 11, 16
# Channels of their residual stream.
VALUE = range(0, 10)  # which digit
IS_DIGIT, IS_QUESTION, IS_FILLER = 10, 11, 12
CARRIED = range(16, 26)  # a digit that a head brought to the question
ANSWER = range(26, 36)  # read by the output layer
HIDDEN, HEAD_DIM = 48, 16
SLOWEST = HEAD_DIM - 1  # the head channel that RoPE turns least: not at all at a huge base
RECEIVER, DECOY = (1, 3), (1, 2)
SENDER = (0, 1)


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    initialize_model_parallel()
    yield
    torch.set_num_threads(threads)


def teacher(seed: int = 0, **fields: object) -> GPTModel:
    """A random teacher of two layers with four heads in two groups."""
    torch.manual_seed(seed)
    shape = dict(
        num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=64, num_attention_heads=4,
        num_query_groups=2, kv_channels=HEAD_DIM, vocab_size=VOCAB, rotary_base=1e12,
    )  # fmt: skip
    model = build_model(HydraConfig(**{**megatron_fields(), **shape, **fields}), None)
    return model.eval()


@torch.no_grad()
def blank_model() -> GPTModel:
    """Tokens are embedded by what they are, the answer channels are read out, nothing else."""
    model = teacher()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    embedding = model.embedding.word_embeddings.weight
    for digit in range(10):
        embedding[digit, VALUE[digit]] = embedding[digit, IS_DIGIT] = 1.0
        model.output_layer.weight[digit, ANSWER[digit]] = 5.0
    embedding[QUESTION, IS_QUESTION] = 1.0
    embedding[FILLER:, IS_FILLER] = 1.0
    return model


@torch.no_grad()
def wire(
    model: GPTModel, place: tuple[int, int], key: int, reads: range, writes: range | None
) -> None:
    """Let a head attend from the question to the tokens with channel ``key`` and copy digits."""
    layer, head = place
    attention = model.decoder.layers[layer].self_attention
    rows = attention.linear_qkv.weight.view(2, 4, HEAD_DIM, HIDDEN)  # [group, q q k v, d, h]
    group, position = divmod(head, 2)
    rows[group, position, SLOWEST, IS_QUESTION] = 1.0
    rows[group, 2, SLOWEST, key] = 1.0
    for channel, source in enumerate(reads):
        rows[group, 3, channel, source] = 1.0
    for norm in (attention.q_layernorm, attention.k_layernorm):
        norm.weight.fill_(4.0)  # sharpens: the wanted token gets e^64 of the others' weight
    for channel, target in enumerate(writes or ()):
        attention.linear_proj.weight[target, head * HEAD_DIM + channel] = 1.0


def sample(digit: int | None, answer: int, position: int = 3, length: int = 12) -> NeedleSample:
    tokens = [FILLER] * (length - 1) + [QUESTION]
    if digit is not None:
        tokens[position] = digit
    return NeedleSample(tokens, [answer], position / length, "key", str(answer), (position,))


def digit_probe() -> Probe:
    pairs = [
        CounterfactualPair(sample(a, a, position), sample(b, b, position))
        for a, b, position in ((1, 7, 0), (2, 3, 4), (9, 0, 10))
    ]
    return Probe("digit", "retrieval", pairs, 13, 0)


def test_the_head_that_writes_the_answer_scores_1_and_a_decoy_scores_0() -> None:
    model = blank_model()
    wire(model, RECEIVER, IS_DIGIT, VALUE, ANSWER)
    wire(model, DECOY, IS_DIGIT, VALUE, None)
    result = ActivationPatching().score(model, [digit_probe()])
    scores, consistency = assemble_scores(result)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[RECEIVER] = 1.0
    for found in (result.probes[0].effects, scores, consistency):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_head_that_only_feeds_another_gets_no_share() -> None:
    model = blank_model()
    wire(model, SENDER, IS_DIGIT, VALUE, CARRIED)
    wire(model, RECEIVER, IS_QUESTION, CARRIED, ANSWER)
    probe = digit_probe()
    effects = ActivationPatching().score(model, [probe]).probes[0].effects
    assert effects[RECEIVER] == pytest.approx(1.0, abs=1e-6)
    assert effects[SENDER] == pytest.approx(0.0, abs=1e-6)
    # Without the freeze the same patch takes the whole answer away, so the 0 is the freeze's.
    assert plain_effect(model, probe.pairs[0], SENDER, freeze=False) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("at_once", [1, 4096])
def test_equals_the_plain_loop(tied: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One head, one pair, one whole forward, all positions patched: the oracle."""
    monkeypatch.setattr(activation_patching, "_MAX_PATCHED_POSITIONS", at_once)
    monkeypatch.setattr(activation_patching, "_MAX_TOKENS", at_once)
    model = teacher(3, rotary_base=1e4, share_embeddings_and_output_weights=tied)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # at Megatron's initialisation no head matters
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    probe = random_probe(num_pairs=4, length=9, num_answer_tokens=3)
    found = ActivationPatching(min_gap=0.05).score(model, [probe]).probes[0]
    assert len(found.kept) >= 2
    for row, pair in enumerate(found.kept):
        for place in ((0, 0), (0, 3), (1, 1), (1, 2)):
            expected = plain_effect(model, probe.pairs[pair], place)
            assert found.pair_effects[row][place] == pytest.approx(expected, abs=2e-4)
    assert found.effects.abs().max() > 0.05


def random_probe(num_pairs: int, length: int, num_answer_tokens: int) -> Probe:
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for _ in range(num_pairs):
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        answer = torch.randint(0, VOCAB, (num_answer_tokens,), generator=generator).tolist()
        other = [(token + 5) % VOCAB for token in answer]
        end = 2 + num_answer_tokens
        twins = [
            NeedleSample([*tokens[:2], *a, *tokens[end:]], a, 0.2, "key", "", tuple(range(2, end)))
            for a in (answer, other)
        ]
        pairs.append(CounterfactualPair(*twins))
    return Probe("random", "retrieval", pairs, length + num_answer_tokens, 5)


@torch.no_grad()
def plain_effect(
    model: GPTModel, pair: CounterfactualPair, place: tuple[int, int], freeze: bool = True
) -> float:
    """Indirect effect of one head on one pair by whole forwards, patched at every position."""
    answer, other = pair.clean.answer, pair.corrupt.answer
    projections = [layer.self_attention.linear_proj for layer in model.decoder.layers]

    def run(prompt: Sequence[int], swaps: dict[int, Tensor]) -> tuple[float, list[Tensor]]:
        tokens = torch.tensor([[*prompt, *answer[:-1]]])
        seen: list[Tensor] = []

        def swap(module: nn.Module, args: tuple) -> tuple:
            value = swaps.get(len(seen), args[0])
            seen.append(value.clone())
            return (value,)

        hooks = [module.register_forward_pre_hook(swap) for module in projections]
        logits = model(tokens, torch.arange(tokens.shape[1])[None], None)[0, len(prompt) - 1 :]
        for hook in hooks:
            hook.remove()
        weights = [0.9**j for j in range(len(answer))]
        terms = [
            w * float(logits[j, a] - logits[j, b])
            for j, (w, a, b) in enumerate(zip(weights, answer, other, strict=True))
        ]
        return sum(terms) / sum(weights), seen

    clean, clean_heads = run(pair.clean.tokens, {})
    corrupt, corrupt_heads = run(pair.corrupt.tokens, {})
    layer, head = place
    patched = clean_heads[layer].clone()
    channels = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
    patched[..., channels] = corrupt_heads[layer][..., channels]
    frozen = {above: clean_heads[above] for above in range(layer + 1, len(projections))}
    readout_patched, _ = run(pair.clean.tokens, {layer: patched, **(frozen if freeze else {})})
    return (clean - readout_patched) / (clean - corrupt)


def test_readout_weighs_answer_tokens_by_powers_of_lambda() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 1], logits[0, 1, 2] = 3.0, 5.0
    found = readout(logits, torch.tensor([[1, 2]]), torch.tensor([[0, 3]]))
    assert found.item() == pytest.approx((3.0 + 0.9 * 5.0) / 1.9)


def test_activations_equal_transformers(tmp_path: Path) -> None:
    from transformers import Qwen3ForCausalLM

    folder = write_tiny_qwen3(tmp_path / "teacher")
    reference = Qwen3ForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(1))
    inputs: list[Tensor] = []
    for layer in reference.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0])
        )
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True)

    found = run_with_answer_activations(load_teacher(folder).eval(), tokens, 4)
    assert len(found.head_outputs) == len(inputs) == 2
    for ours, theirs in zip(found.head_outputs, inputs, strict=True):
        torch.testing.assert_close(ours.transpose(0, 1), theirs[:, -4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.embedding.transpose(0, 1), expected.hidden_states[0][:, -4:])
    torch.testing.assert_close(found.logits, expected.logits[:, -4:], atol=1e-4, rtol=1e-4)


def test_pairs_that_the_model_cannot_tell_apart_are_dropped_and_counted() -> None:
    model = blank_model()
    wire(model, RECEIVER, IS_DIGIT, VALUE, ANSWER)
    good = digit_probe()
    same = CounterfactualPair(sample(None, 4), sample(None, 5))  # no needle: nothing to tell
    mixed = Probe("mixed", "retrieval", [same, *good.pairs, same], 13, 0)
    expected, found = ActivationPatching().score(model, [good, mixed]).probes
    assert found.kept == (1, 2, 3)
    torch.testing.assert_close(found.pair_effects, expected.pair_effects)
    record = found.counts()
    assert (record["pairs"], record["kept"], record["dropped"]) == (5, 3, 2)

    with pytest.raises(UserError, match="'nothing'.*of 2 pairs"):
        ActivationPatching().score(model, [Probe("nothing", "retrieval", [same, same], 13, 0)])


def test_logits_that_are_not_finite_are_refused() -> None:
    model = blank_model()
    with torch.no_grad():
        model.output_layer.weight[3, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        ActivationPatching().score(model, [digit_probe()])


def test_heads_of_all_ranks_cover_the_channels_once() -> None:
    config = SimpleNamespace(num_attention_heads=8, kv_channels=4)
    for tp in (1, 2, 4):
        seen = []
        for rank in range(tp):
            group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda tp=tp: tp)
            model = SimpleNamespace(config=config, pg_collection=SimpleNamespace(tp=group))
            found = [head_channels(model, head) for head in range(8)]
            local = range(rank * 8 // tp, (rank + 1) * 8 // tp)
            assert [head for head, part in enumerate(found) if part is not None] == list(local)
            seen += [rank * 32 // tp + i for part in found if part for i in range(32)[part]]
        assert seen == list(range(32))


def effects_of(capability: str, *rows: list[float]) -> ProbeEffects:
    probe = Probe(capability, capability, [], 0, 0)
    return ProbeEffects(probe, torch.tensor([[row] for row in rows], dtype=torch.float64), ())


def test_scores_combine_strength_consistency_and_capability() -> None:
    effects = (
        effects_of("retrieval", [0.8, 0.0, -0.4], [0.8, 0.016, -0.4]),  # two pairs: their mean
        effects_of("retrieval", [0.4, 0.5, 0.009]),
    )
    scores, consistency = assemble_scores(ScorerResult("test", effects))
    torch.testing.assert_close(consistency, torch.tensor([[1.0, 0.5, 0.5]]).double())
    raw = torch.tensor([0.6, 0.254 * 0.5, 0.2045 * 0.5], dtype=torch.float64)
    torch.testing.assert_close(scores[0], (raw - raw[2]) / (raw[0] - raw[2]))

    with_copy = assemble_scores(
        ScorerResult("test", (*effects, effects_of("copy", [0.0, 0.0, 2.0])))
    )[0]
    torch.testing.assert_close(with_copy[0], (scores[0] + torch.tensor([0, 0, 1.0])) / 2)


def test_a_constant_map_scores_0_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    scores, _ = assemble_scores(ScorerResult("test", (effects_of("retrieval", [0.3, 0.3]),)))
    assert scores.tolist() == [[0.0, 0.0]]
    assert "none stands out" in caplog.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "teacher"
    return write_tiny_qwen3(path, max_position_embeddings=256)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Sentence {i} says that {i * i} is a square. " for i in range(2000)))
    return path


def test_command_writes_scores(
    folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    command = [
        "score", "--teacher", str(folder), "--out", str(out), "--probes", "single,multi_key:2",
        "--pairs", "8", "--length", "256", "--text", str(text_file), "--min-gap", "1e-4",
    ]  # fmt: skip
    assert main(command) == 0
    scores = HeadScores.load(out)
    assert (scores.num_layers, scores.num_heads, scores.num_query_groups) == (2, 4, 2)
    assert scores.teacher_config_hash == config_hash(folder)
    assert list(scores.effects) == ["single", "multi_key_2"]
    probes = scores.provenance["probes"]
    assert [probe["length_tokens"] for probe in probes] == [256, 256]
    assert all(probe["kept"] + probe["dropped"] == probe["pairs"] == 8 for probe in probes)
    said = capsys.readouterr().out
    assert f"single: {probes[0]['kept']} of 8 pairs kept, {probes[0]['dropped']} dropped" in said
    assert max(map(max, scores.scores)) == 1.0 and min(map(min, scores.scores)) == 0.0

    before = out.read_bytes()
    assert main(command) == 2
    assert out.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert HeadScores.load(out).scores == scores.scores


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "missing"], "model folder missing does not exist"),
        (["--probes", "single,double"], "unknown probe 'double'"),
        (["--probes", "single:3"], "probe 'single:3' is not understood"),
        (["--probes", "single,single"], "probe 'single' stands twice"),
        (["--pairs", "0"], "0 pairs a probe"),
        (["--length", "257"], "--length is 257; the teacher is built for 256 tokens"),
        (["--length", "60"], "a sample of 60 tokens has no room"),
        (["--min-gap", "0"], "it must be above 0"),
        (["--min-gap", "1000"], "probe 'single' says nothing about this model: of 2 pairs"),
        (["--text", "nowhere.txt"], "cannot read the text file nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str],
    message: str,
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["score", "--teacher", str(folder), "--out", str(tmp_path / "scores.json")]
    command += ["--probes", "single", "--pairs", "2", "--text", str(text_file), *arguments]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("megatron-hydra: error: ") == 1
    assert message in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
