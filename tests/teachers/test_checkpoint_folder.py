"""Checkpoint folders: what is saved comes back, at any layout, and broken folders are named."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_hydra import cpu

cpu.install_if_needed()

from kit.distributed import run_distributed  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.model.build import build_model  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.teachers import (  # noqa: E402
    checkpoint,
    config_json,
    distributed_weights,
    loading,
)
from megatron_hydra.teachers.checkpoint import load_any_model  # noqa: E402
from megatron_hydra.teachers.tokenizer import load_tokenizer  # noqa: E402

PLAN = {0: [1, 2], 1: [3]}
FIELDS = {"la_short_conv": False, "seq_length": 48, "fa_query_scale_base": 100.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Untied: the output layer is then a tensor of its own.
    return write_tiny_qwen3(tmp_path_factory.mktemp("t") / "teacher", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def hybrid(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("h") / "hybrid"
    _save(folder, teacher)
    return folder


def _plan(teacher: Path) -> HeadPlan:
    return HeadPlan.from_fa_heads(PLAN, 2, 4, 2, config_json.config_hash(teacher), {"seed": 3})


def _save(folder: Path, teacher: Path, tensor: int = 1, pipeline: int = 1, **fields: Any) -> None:
    """Save a hybrid at a layout; its own initialisation does not depend on that layout."""
    initialize_model_parallel(tensor, pipeline)
    fields = {**FIELDS, "tensor_model_parallel_size": tensor,
              "pipeline_model_parallel_size": pipeline, **fields}  # fmt: skip
    config = loading.hydra_config(teacher, **fields)
    model = build_model(
        config,
        _plan(teacher),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    checkpoint.save_checkpoint(folder, model, config, _plan(teacher), teacher, {"by": "test"})


def _load(folder: Path, **overrides: Any) -> Any:
    initialize_model_parallel()
    return load_any_model(folder, **overrides)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Full logits, whatever the tensor-parallel size."""
    device = next(model.parameters()).device
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1)).to(device)
    logits = model.eval()(tokens, torch.arange(40, device=device).expand(2, -1), None)
    return gather_from_tensor_model_parallel_region(logits.contiguous())


def test_everything_comes_back(teacher: Path, hybrid: Path, tmp_path: Path) -> None:
    first = _load(hybrid)
    assert first.plan == _plan(teacher)
    assert first.meta["kind"] == "hybrid"
    assert first.meta["teacher_config_hash"] == config_json.config_hash(teacher)
    assert first.meta["provenance"] == {"by": "test"}
    assert {name: getattr(first.config, name) for name in FIELDS} == FIELDS
    tokenizer = load_tokenizer(first.tokenizer_folder)
    assert tokenizer.encode("ab\n") == load_tokenizer(teacher).encode("ab\n")

    # A change of every parameter survives a second round, bit by bit.
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for layer in first.model.decoder.layers:
            attention = layer.self_attention
            # Belongs to no head: not stored.
            attention.in_proj.weight[attention.layout.padding_rows] = 0
    checkpoint.save_checkpoint(
        tmp_path / "again", first.model, first.config, first.plan, first.tokenizer_folder, {}
    )
    second = _load(tmp_path / "again")
    state = second.model.state_dict()
    for name, parameter in first.model.named_parameters():
        assert torch.equal(state[name], parameter), name
    assert second.meta["config"] == first.meta["config"]


def test_teacher_folders_of_both_kinds_are_one_model(teacher: Path, tmp_path: Path) -> None:
    source = _load(teacher)
    assert (source.plan, source.meta["kind"]) == (None, "teacher")
    checkpoint.save_checkpoint(
        tmp_path / "ckpt", source.model, source.config, None, source.tokenizer_folder, {}
    )
    loaded = _load(tmp_path / "ckpt")
    assert loaded.plan is None
    assert torch.equal(_logits(loaded.model), _logits(source.model))


@pytest.mark.parametrize(
    ("value", "said"),
    [(80.0, None), (80.5, "80.5"), (89.0, "89"), (torch.inf, "inf"), (torch.nan, "nan")],
)
def test_a_decay_that_would_give_nan_is_refused(
    hybrid: Path, tmp_path: Path, value: float, said: str | None
) -> None:
    """exp(89) is no float32, and infinity times softplus(-100), which is 0, is NaN."""
    _save_with_a_log(tmp_path / "ckpt", hybrid, value)
    if said is None:
        assert _logits(_load(tmp_path / "ckpt").model).isfinite().all()
        return
    with pytest.raises(UserError, match=rf"A_log of head 2 \(LA\) of layer 1 is {said}, .* 80 at"):
        _load(tmp_path / "ckpt")


def _save_with_a_log(folder: Path, hybrid: Path, value: float) -> None:
    """The hybrid with this A_log for head 2 of layer 1."""
    loaded = _load(hybrid)
    branch = loaded.model.decoder.layers[1].self_attention.linear_attention
    with torch.no_grad():
        branch.A_log[branch.heads.index(2)] = value
    rest = (loaded.model, loaded.config, loaded.plan, loaded.tokenizer_folder, {})
    checkpoint.save_checkpoint(folder, *rest)


def test_saving_starts_no_process(hybrid: Path) -> None:
    """Megatron's own writer does, and a script without a main guard would then run twice."""
    assert hybrid.is_dir()
    assert multiprocessing.active_children() == []


def test_runtime_choices_are_made_at_load(hybrid: Path) -> None:
    stored = json.loads((hybrid / "model.json").read_text())["config"]
    assert not {"placement", "backend", "la_kernel", "tensor_model_parallel_size"} & set(stored)
    narrow = _load(hybrid, params_dtype=torch.bfloat16, placement="by_type")
    assert narrow.config.bf16
    assert narrow.model.output_layer.weight.dtype == torch.bfloat16
    wide = _load(hybrid).model.output_layer.weight
    assert torch.equal(narrow.model.output_layer.weight, wide.bfloat16())
    with pytest.raises(UserError, match="given by the teacher"):
        _load(hybrid, num_layers=1)


def _on_four_ranks(hybrid: Path, teacher: Path, folder: Path, expected: Tensor) -> None:
    initialize_model_parallel(tensor=4)
    for placement in ("by_type", "balanced"):
        loaded = load_any_model(hybrid, placement=placement)
        assert loaded.config.tensor_model_parallel_size == 4
        torch.testing.assert_close(_logits(loaded.model), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="loads on one rank only"):
        load_any_model(teacher)
    # One rank has the head; all hear of it.
    with pytest.raises(UserError, match="A_log of head 2"):
        load_any_model(hybrid.parent / "bad")

    parallel_state.destroy_model_parallel()
    _save(folder / "tensor", teacher, tensor=2, placement="by_type")  # two data-parallel replicas
    # Every rank hears of it; none waits for the others for ever.
    with pytest.raises(UserError, match="exists"):
        _save(folder / "tensor", teacher, tensor=2)
    two = _logits(load_any_model(folder / "tensor", placement="by_type").model)

    parallel_state.destroy_model_parallel()
    _save(folder / "pipeline", teacher, tensor=2, pipeline=2)

    parallel_state.destroy_model_parallel()
    initialize_model_parallel(tensor=4)
    four = _logits(load_any_model(folder / "tensor", placement="balanced").model)
    torch.testing.assert_close(four, two, atol=1e-5, rtol=0)


@pytest.mark.dist
@pytest.mark.slow
def test_layouts_load_each_others_folders(teacher: Path, hybrid: Path, tmp_path: Path) -> None:
    """TP=1 to TP=4, TP=2 to TP=4 (logits); TP=2 and TP=2, PP=2 to TP=1 (parameters)."""
    _save_with_a_log(hybrid.parent / "bad", hybrid, 90.0)
    whole = _load(hybrid).model
    run_distributed(_on_four_ranks, 4, hybrid, teacher, tmp_path, _logits(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline", "tensor"]
    for layout in ("tensor", "pipeline"):
        theirs = dict(_load(tmp_path / layout).model.named_parameters())
        # Attention starts the same in every layout; Megatron draws the rest rank by rank.
        for name, parameter in whole.named_parameters():
            assert theirs[name].shape == parameter.shape
            if "self_attention" in name:
                assert torch.equal(theirs[name], parameter), (layout, name)


def _edit_meta(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "model.json").read_text())["config"]
        _edit_meta(config={**config, **changes})(folder)

    return edit


def _truncate_weights(folder: Path) -> None:
    path = next((folder / "weights").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_plan(folder: Path) -> None:
    HeadPlan.from_fa_heads({0: [0]}, 2, 4, 2, "feed" * 16).save(folder / "plan.json", True)


def _other_heads(folder: Path) -> None:
    HeadPlan.from_fa_heads({0: [0, 1, 2]}, 2, 4, 2).save(folder / "plan.json", True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.json").unlink(), "neither a checkpoint"),
        (lambda folder: (folder / "model.json").write_text("{"), "model.json is not valid JSON"),
        (lambda folder: (folder / "plan.json").unlink(), "plan.json"),
        (lambda folder: shutil.rmtree(folder / "weights"), "no complete weights"),
        (
            lambda folder: next((folder / "weights").glob("*.distcp")).unlink(),
            "is missing or damaged",
        ),
        (_truncate_weights, "is missing or damaged"),
        (_other_plan, "another teacher"),
        (_other_heads, "another model or head plan"),
        (_edit_meta(schema_version=2), "schema version 2"),
        (_edit_meta(kind="student"), "'student', but a file of kind 'teacher' or 'hybrid' is"),
        (_edit_config(new_field=1), r"the config in .*model.json: unknown key new_field"),
        (_edit_config(num_layers=1), "does not match its teacher_config_hash"),
        (_edit_config(params_dtype="int8"), "params_dtype is 'int8'; allowed: float32"),
        (_edit_config(kv_channels=None), "kv_channels is None; an integer is needed"),
        (_edit_config(fusion="mean"), "fusion is 'mean'; allowed: scale, norm, none, gate"),
        (_edit_meta(teacher_config_hash=1), "teacher_config_hash is 1; text is needed"),
    ],
)
def test_broken_folders_are_named(
    hybrid: Path, tmp_path: Path, spoil: Callable, message: str
) -> None:
    folder = Path(shutil.copytree(hybrid, tmp_path / "broken"))
    spoil(folder)
    with pytest.raises(UserError, match=message):
        _load(folder)


class Harmful:
    """Pickled, a call of `os.system` for whoever loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            ".metadata",
            r"whose \.metadata names posix\.system: it describes no tensor, and would be",
        ),
        ("common.pt", r"common\.pt is missing or damaged \(UnpicklingError\)"),
    ],
)
def test_what_a_strangers_folder_brings_along_is_not_run(
    hybrid: Path, tmp_path: Path, name: str, message: str
) -> None:
    """Catches a checkpoint of somebody else's that does what it likes on this machine."""
    folder = Path(shutil.copytree(hybrid, tmp_path / "strange"))
    mark = tmp_path / "was_run"
    file = folder / "weights" / name
    if name == ".metadata":
        file.write_bytes(pickle.dumps([Harmful(mark), pickle.loads(file.read_bytes())]))
    else:
        torch.save({"args": Harmful(mark)}, file)
    with pytest.raises(UserError, match=message):
        _load(folder)
    assert not mark.exists()
    if name == ".metadata":  # it would have been
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.exists()


class AsPython3112(pickle.Pickler):
    """Writes members of enumerations as early releases of Python 3.11 do, as Debian 12's."""

    def reducer_override(self, it: object) -> Any:
        return (getattr, (type(it), it.name)) if isinstance(it, Enum) else NotImplemented


def test_weights_that_another_release_of_python_wrote_are_read(
    hybrid: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hybrid, tmp_path / "earlier"))
    file = folder / "weights/.metadata"
    metadata = pickle.loads(file.read_bytes())
    with file.open("wb") as stream:
        AsPython3112(stream).dump(metadata)
    assert b"getattr" in file.read_bytes()
    assert {*_load(folder).model.state_dict()} == {*_load(hybrid).model.state_dict()}


FORMATS = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
GETATTR, INIT = b"cbuiltins\ngetattr\n", b"X\x08\0\0\0__init__"


@pytest.mark.parametrize(
    "pickled",
    [
        GETATTR + FORMATS + INIT + b"\x86R.",
        GETATTR + b"cpathlib\nPosixPath\nX\x03\0\0\0cwd\x86R.",
        # `__init__` becomes a member first, by which everything in Python can be reached.
        FORMATS + b"N}X\x0c\0\0\0_member_map_}" + INIT + FORMATS + b"ss\x86b0"
        + GETATTR + FORMATS + INIT + b"\x86R.",
    ],
    ids=["no member", "no format", "made a member"],
)  # fmt: skip
def test_nothing_but_a_member_is_looked_up(
    hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bytes
) -> None:
    members = dict(_MEM_FORMAT_ENCODING._member_map_)
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "_member_map_", members)  # put back at the end
    folder = Path(shutil.copytree(hybrid, tmp_path / "strange"))
    (folder / "weights/.metadata").write_bytes(b"\x80\x02" + pickled)
    with pytest.raises(UserError, match=r"whose \.metadata names builtins\.getattr"):
        _load(folder)


def test_an_earlier_folder_is_replaced_only_when_asked_and_only_as_a_whole(
    teacher: Path, hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(hybrid, tmp_path / "ckpt"))
    loaded = _load(folder)
    rest = (loaded.model, loaded.config, loaded.plan)
    with pytest.raises(UserError, match="exists"):
        checkpoint.save_checkpoint(folder, *rest, teacher, {})
    with pytest.raises(UserError, match="no tokenizer"):
        checkpoint.save_checkpoint(folder, *rest, tmp_path, {}, overwrite=True)
    with monkeypatch.context() as patch:

        def fail(*args: Any) -> None:
            raise OSError("disk full")

        patch.setattr(distributed_weights.InProcessSave, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save_checkpoint(folder, *rest, teacher, {}, overwrite=True)
    assert _load(folder).meta["provenance"] == {"by": "test"}
    checkpoint.save_checkpoint(folder, *rest, teacher, {"new": 1}, overwrite=True)
    assert _load(folder).meta["provenance"] == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
