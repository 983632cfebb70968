"""Loss on text: equal to a plain loop, any lengths, no logits of a whole window, beyond numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hydra import cpu
from megatron_hydra.errors import UserError

cpu.install_if_needed()

from hydra_tools.cli import main  # noqa: E402
from kit.tiny import random_model  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

from megatron_hydra.evaluation import perplexity as perplexity_module  # noqa: E402
from megatron_hydra.evaluation.perplexity import mean_loss, text_windows  # noqa: E402
from megatron_hydra.evaluation.reading import read_evaluation  # noqa: E402
from megatron_hydra.evaluation.results import (  # noqa: E402
    Accuracy,
    Evaluation,
    ModelResult,
    NeedleGrid,
    format_perplexity,
    format_table,
)
from megatron_hydra.teachers.loading import load_teacher  # noqa: E402

VOCAB = 32

pytestmark = pytest.mark.usefixtures("one_rank_of_module")


def random_text(num_tokens: int, vocab: int = VOCAB) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocab, (num_tokens,), generator=generator).tolist()


def loss_by_a_loop(logits_of: Any, tokens: torch.Tensor, length: int) -> float:
    """Window by window, token by token, in float64; the last window may be short."""
    total, num_predicted = 0.0, len(tokens) - 1
    for start in range(0, num_predicted, length):
        window = tokens[start : min(start + length, num_predicted)]
        with torch.no_grad():
            logits = logits_of(window[None])[0].double()
        for position in range(len(window)):
            total -= logits[position].log_softmax(0)[tokens[start + position + 1]].item()
    return total / num_predicted


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 8192])
@pytest.mark.parametrize("max_logits", [1, 7 * VOCAB, 2**25])
def test_loss_is_the_mean_over_windows_run_alone(
    tied: bool, max_tokens: int, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few tokens a forward takes and however few of them have logits at once."""
    monkeypatch.setattr(perplexity_module, "MAX_TOKENS", max_tokens)
    monkeypatch.setattr(perplexity_module, "MAX_LOGITS", max_logits)
    model = random_model(share_embeddings_and_output_weights=tied)
    tokens = text_windows(random_text(50), (6, 12), 40)
    assert tokens.tolist() == random_text(50)[:37]

    def logits_of(window: torch.Tensor) -> torch.Tensor:
        return model(window, torch.arange(window.shape[1])[None], None)

    for length in (6, 12):
        expected = loss_by_a_loop(logits_of, tokens, length)
        assert mean_loss(model, tokens, length) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lengths", [(1000, 1024, 999), (7, 11, 13)])
def test_lengths_without_a_common_multiple_predict_the_same_tokens(
    lengths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' own model has it, which knows of no windows."""
    monkeypatch.setattr(perplexity_module, "MAX_LOGITS", 100 * 264)
    folder = write_tiny_qwen3(tmp_path / "teacher")
    oracle = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model = load_teacher(folder).eval()
    longest = max(lengths)
    tokens = text_windows(random_text(2 * longest + 5, 264), lengths, 10**6)
    assert len(tokens) - 1 == 2 * longest
    for length in lengths:
        expected = loss_by_a_loop(lambda window: oracle(window).logits, tokens, length)
        assert mean_loss(model, tokens, length) == pytest.approx(expected, rel=1e-5)


def test_lengths_that_the_text_or_the_tokens_cannot_fill_are_named() -> None:
    with pytest.raises(UserError, match="6 tokens needs 7 .* are 6: ask for --lengths up to 5"):
        text_windows(range(6), (4, 6), 1000)
    with pytest.raises(UserError, match="--perplexity-tokens is 5, less than one window of 6"):
        text_windows(range(100), (4, 6), 5)


class _WidestLogits(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocab,):
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return out


@pytest.mark.parametrize("num_windows", [1, 3])
def test_logits_exist_for_a_chunk_of_tokens_only(
    num_windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, chunk, length = 4096, 64, 300
    monkeypatch.setattr(perplexity_module, "MAX_LOGITS", chunk * vocab, raising=False)
    model = random_model(vocab_size=vocab)
    tokens = torch.tensor(random_text(num_windows * length + 1, vocab))
    with _WidestLogits(vocab) as seen:
        mean_loss(model, tokens, length)
    assert seen.rows == chunk


def test_a_model_that_knows_nothing_has_the_loss_of_the_vocabulary() -> None:
    model = random_model()
    with torch.no_grad():
        model.output_layer.weight.zero_()
    tokens = text_windows(list(range(VOCAB)), (10,), 100)
    assert mean_loss(model, tokens, 10) == pytest.approx(math.log(VOCAB), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "text"),
    [(0.0, "1.00"), (math.log(1234.5), "1,234.50"), (20.0, "e^20.0"), (709.7, "e^709.7"),
     (5000.04, "e^5,000.0")],
)  # fmt: skip
def test_a_perplexity_is_written_so_that_it_can_be_read(loss: float, text: str) -> None:
    assert format_perplexity(loss) == text


def result(losses: dict[int, float]) -> ModelResult:
    accuracy = {("single", 64): Accuracy(15, 20)}
    grid = NeedleGrid("single", (64,), (0.0,), ((0.75,),))
    return ModelResult("m", "m", None, "", 8, 1024, 0, accuracy, grid, losses)


def test_a_loss_beyond_709_nats_is_kept_in_nats(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    written = Evaluation((result({64: 812.3, 128: 2.0}),), 64, {})
    written.save(path)
    assert read_evaluation(path) == written
    (model,) = json.loads(path.read_text())["models"]
    assert model["perplexity"] == {"64": None, "128": math.exp(2.0)}
    assert model["loss_nats"] == {"64": 812.3, "128": 2.0}
    assert "e^812.3" in format_table(written.models, "bf16")


def test_a_file_of_an_earlier_release_has_the_perplexity_alone(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    Evaluation((result({64: math.log(17.0)}),), 64, {}).save(path)
    data = json.loads(path.read_text())
    data["models"][0].pop("loss_nats")
    path.write_text(json.dumps(data))
    (model,) = read_evaluation(path).models
    assert model.loss_nats[64] == pytest.approx(math.log(17.0))


@pytest.mark.parametrize(
    "perplexity", [{"64": None}, {"64": 3.0}, {}, {"64": math.exp(2.0), "128": 2.0}]
)
def test_a_perplexity_that_contradicts_its_loss_is_refused(
    perplexity: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    Evaluation((result({64: 2.0}),), 64, {}).save(path)
    data = json.loads(path.read_text())
    data["models"][0]["perplexity"] = perplexity
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="perplexity"):
        read_evaluation(path)


def test_a_model_with_a_loss_above_709_nats_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its output weights are scaled until wrong tokens are more than e^709 times as likely."""
    folder = write_tiny_qwen3(tmp_path / "teacher", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("".join(f"Sentence {i} says that {i * i} is a square. " for i in range(2000)))
    command = ["evaluate", "--model", f"huge={folder}", "--text", str(text), "--out", str(out)]
    options = ["--lengths", "200,300", "--tasks", "single", "--num-samples", "5"]
    assert main([*command, *options, "--perplexity-tokens", "600"]) == 0
    (model,) = read_evaluation(out).models
    assert min(model.loss_nats.values()) > 709
    assert format_perplexity(model.loss_nats[200]) in capsys.readouterr().out
