"""Heads as documents of one row, with the reference in the kernels' place: no GPU is needed.

Catches: a head that reads another's tokens or state, a document's state that goes on into the next,
groups of heads cut elsewhere than between heads, a copy of what lies head by head, cuts of one row
that are not those of every row.
"""

from __future__ import annotations

import errno
import time
from types import SimpleNamespace

import pytest
import torch
from hydra_kernels.gated_delta_rule import compilation, documents, fla_kernels
from hydra_kernels.gated_delta_rule.documents import CHUNK_SIZE, Documents, most_rows, one_row
from hydra_kernels.gated_delta_rule.reference import recurrent_gated_delta_rule
from test_gated_delta_rule import NAMES, SCALE, assert_all_close, make_inputs, values_and_gradients

PACKED = {"whole": None, "packed": [0, 1, 2, 9, 17]}


@pytest.fixture(autouse=True)
def _reference_as_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(row, scale, states, output_final_state, documents, uses_flash_qla, chunk_size):
        outputs, ends = [], []
        cu_seqlens = documents.cu_seqlens.tolist()
        assert row[0].shape[:3] == (1, cu_seqlens[-1], 1)
        for i, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
            first = i % documents.num_documents == 0
            state = None
            if states is not None and first:
                state = states[i // documents.num_documents][None, None]
            output, end_state = recurrent_gated_delta_rule(
                *(x[:, start:end] for x in row), scale, state
            )
            outputs.append(output)
            ends.append(end_state[:, 0])
        of_rows = torch.cat(ends)[documents.num_documents - 1 :: documents.num_documents]
        return torch.cat(outputs, 1), of_rows if output_final_state else None

    monkeypatch.setattr(fla_kernels, "run", run)
    monkeypatch.setattr(fla_kernels, "why_not_flash_qla", lambda *row: None)
    monkeypatch.setattr(fla_kernels, "check_device", lambda x, impl: None)
    monkeypatch.setattr(compilation, "compile_once", lambda mode, device: None)


@pytest.mark.parametrize("cuts", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("heads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "most_elements, of_channels",
    [(2**31 - 1, False), (2**31 - 1, True), (600, False), (256, False)],
)
def test_heads_stay_apart(heads, cuts, most_elements, of_channels, monkeypatch):
    monkeypatch.setattr(documents, "_MOST_ELEMENTS", most_elements)
    batch = 2 if cuts is None else 1
    inputs = make_inputs(17, batch=batch, heads=heads, of_channels=of_channels)
    cu_seqlens = None if cuts is None else torch.tensor(cuts)

    def by_documents(x):
        tensors = [x[name] for name in NAMES[:5]]
        return fla_kernels.gated_delta_rule(
            *tensors, SCALE, x["initial_state"], True, cu_seqlens, CHUNK_SIZE
        )

    def by_recurrence(x):
        return recurrent_gated_delta_rule(
            *(x[n] for n in NAMES[:5]), SCALE, x[NAMES[5]], cu_seqlens
        )

    assert_all_close(
        values_and_gradients(by_documents, inputs),
        values_and_gradients(by_recurrence, inputs),
        1e-12,
    )
    tensors = [inputs[name] for name in NAMES[:5]]
    output, state = fla_kernels.gated_delta_rule(
        *tensors, SCALE, None, False, cu_seqlens, CHUNK_SIZE
    )
    expected, _ = recurrent_gated_delta_rule(*tensors, SCALE, None, cu_seqlens)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert state is None


def test_what_lies_head_by_head_is_not_copied():
    for shape in ((2, 3, 5, 4), (2, 3, 5)):
        x = torch.randn(shape).transpose(1, 2)
        row = one_row(x)
        assert row.shape == (1, 30, 1, *shape[3:]) and row.is_contiguous()
        assert row.data_ptr() == x.data_ptr()
    output, _ = fla_kernels.gated_delta_rule(
        *(make_inputs(17)[name] for name in NAMES[:5]), SCALE, None, False, None, CHUNK_SIZE
    )
    assert output.transpose(1, 2).is_contiguous()


def test_layers_of_as_many_heads_share_a_lookup():
    cu_seqlens = torch.tensor([0, 3, 17])
    first = documents.packed_rows(cu_seqlens, 5)
    assert documents.packed_rows(cu_seqlens, 5) is first
    assert documents.packed_rows(cu_seqlens, 6).boundaries is first.boundaries
    assert documents.packed_rows(cu_seqlens.clone(), 5) is not first


@pytest.mark.parametrize(("num_tokens", "head_dim"), [(2**17, 128), (2**19, 128), (2**23, 64)])
def test_no_index_leaves_32_bits(num_tokens: int, head_dim: int):
    num_chunks = num_tokens // CHUNK_SIZE
    rows = most_rows(num_tokens, num_chunks, head_dim)
    largest = max(num_tokens * head_dim, num_chunks * head_dim**2)
    assert rows >= 1 and rows * largest < 2**31 <= (rows + 1) * largest


def test_a_row_too_long_is_named():
    with pytest.raises(
        ValueError, match="16777216 tokens of dimension 128 in 262144 .* context par"
    ):
        most_rows(2**24, 2**18, 128)
    with pytest.raises(ValueError, match="and 65535 chunks; .* or pack fewer documents"):
        most_rows(2**17, 2**16, 64, most_chunks=2**16 - 1)


def test_a_grid_holds_the_chunks_of_all_rows_of_a_call(monkeypatch):
    monkeypatch.setattr(fla_kernels, "_MOST_CHUNKS", 2)
    monkeypatch.setattr(fla_kernels, "why_not_flash_qla", lambda *row: "this is a test")
    counts, run = [], fla_kernels.run
    monkeypatch.setattr(
        fla_kernels, "run", lambda *args: counts.append(args[4].num_rows) or run(*args)
    )
    inputs = make_inputs(17, batch=1, heads=5)
    fla_kernels.gated_delta_rule(*(inputs[n] for n in NAMES[:5]), SCALE, None, False, None, 64)
    assert counts == [2, 2, 1]


def test_what_evaluation_looked_up_serves_a_training():
    cu_seqlens = torch.tensor([0, 3, 18])
    with torch.inference_mode():
        of_both = (
            documents.whole_rows(3, 18, cu_seqlens.device),
            documents.packed_rows(cu_seqlens, 3),
        )
        tensors = [x for each in of_both for x in (each.cu_seqlens, each.boundaries)]
    assert not any(x.is_inference() for x in tensors)


def test_chunks_of_one_row_are_those_of_every_row():
    def attached(boundaries, offsets, indices):
        boundaries = torch.tensor(boundaries, dtype=torch.int32)
        told = [torch.tensor(x, dtype=torch.int32) for x in (offsets, indices)]
        boundaries._flash_qla_prepared_varlen = (64, told[0], len(indices), told[1])
        return boundaries

    one = attached([0, 100, 130], [0, 2, 3], [[0, 0], [0, 1], [1, 0]])
    rows = Documents(torch.tensor([0, 100, 130], dtype=torch.int32), 2, torch.device("cpu"))
    size, offsets, count, indices = fla_kernels.chunks_of_all_rows(one, rows)
    assert (size, count, offsets.tolist()) == (64, 6, [0, 2, 3, 5, 6])
    assert indices.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0], [2, 1], [3, 0]]
    assert offsets.dtype == indices.dtype == torch.int32


def test_many_short_documents_have_many_chunks():
    of_row = Documents(torch.tensor([0, 1, 2, 66, 131], dtype=torch.int32), 3, torch.device("cpu"))
    assert of_row.num_chunks() == 1 + 1 + 1 + 2
    assert of_row.num_chunks(16) == 1 + 1 + 4 + 5
    assert of_row.cu_seqlens.tolist() == [
        0, 1, 2, 66, 131, 132, 133, 197, 262, 263, 264, 328, 393
    ]  # fmt: skip


def test_cuts_of_one_row_are_those_of_every_row():
    # Documents 0 to 100 and 100 to 300, the second cut at 200; and the same twice in a row.
    def context(starts, first, document, last, is_first):
        ints = (torch.tensor(x, dtype=torch.int32) for x in (starts, first, document))
        masks = (torch.tensor(x) for x in (last, is_first))
        names = ("intra_cp_cu_seqlens", "seq_map_r2c", "seq_map_c2r", "ht_mask", "ht_mask_bwd")
        return dict(zip(names, (*ints, *masks), strict=True))

    last, is_first = [True, False, True], [True, True, False]
    one = context([0, 100, 200, 300], [0, 1, 3], [0, 1, 1], last, is_first)
    two = context(
        [0, 100, 200, 300, 400, 500, 600],
        [0, 1, 3, 4, 6],
        [0, 1, 1, 2, 3, 3],
        last * 2,
        is_first * 2,
    )
    rows = Documents(torch.tensor([0, 100, 300], dtype=torch.int32), 2, torch.device("cpu"))
    for name, tensor in fla_kernels.cuts_of_all_rows(SimpleNamespace(**one), rows).items():
        assert torch.equal(tensor, two[name]) and tensor.dtype == two[name].dtype, name


def test_one_process_compiles_while_others_wait(tmp_path, monkeypatch):
    """Threads cannot stand in: the kernel's record locks are a process's."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    barrier, log = context.Barrier(3), tmp_path / "log"

    def process():
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(fla_kernels, "why_not_flash_qla", lambda *row: "this is a test")
        monkeypatch.setattr(compilation, "_key", lambda *args: "kernels")

        def compile_all(*args):
            with log.open("a") as stream:
                stream.write("compiled\n")
            time.sleep(0.5)  # so that the others come while it compiles

        monkeypatch.setattr(compilation, "compile_all", compile_all)
        barrier.wait()
        mode = compilation.Mode(128, 128, torch.bfloat16, False)
        assert compilation.compile_once(mode, torch.device("cpu")).is_file()

    processes = [context.Process(target=process) for _ in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
        assert each.exitcode == 0
    assert log.read_text() == "compiled\n"


def test_what_was_not_compiled_is_not_called_so(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fla_kernels, "why_not_flash_qla", lambda *row: "this is a test")
    monkeypatch.setattr(compilation, "_key", lambda *args: "kernels")

    def fails(*args):
        raise RuntimeError("no layout found")

    monkeypatch.setattr(compilation, "compile_all", fails)
    mode = compilation.Mode(128, 128, torch.bfloat16, False)
    with pytest.raises(RuntimeError, match="no layout found"):
        compilation.compile_once(mode, torch.device("cpu"))
    monkeypatch.setattr(compilation, "compile_all", lambda *args: None)
    assert compilation.compile_once(mode, torch.device("cpu")).is_file()
    compilation.compile_once.cache_clear()


@pytest.mark.parametrize("reason", ["install tilelang: `pip install tilelang`", "no layout found"])
def test_decoding_needs_no_backward_kernel(monkeypatch, caplog, reason):
    """fla refuses its backward on some GPUs: what only decodes goes on, other faults do not."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError(reason)

    monkeypatch.undo()
    for name in ("set_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(fla_kernels, "run", lambda row, *args: (Refused.apply(row[0]), None))
    mode = compilation.Mode(64, 64, torch.bfloat16, False)
    if "tilelang" in reason:
        compilation.compile_all(mode, torch.device("cpu"), uses_flash_qla=False)
        assert "only the forward pass is compiled" in caplog.text
    else:
        with pytest.raises(RuntimeError, match=reason):
            compilation.compile_all(mode, torch.device("cpu"), uses_flash_qla=False)


@pytest.mark.parametrize("fault", ["no locks", "no folder"])
def test_a_machine_that_cannot_lock_compiles_all_the_same(tmp_path, monkeypatch, caplog, fault):
    monkeypatch.undo()
    folder = tmp_path / "cache"
    if fault == "no folder":
        folder.write_text("a file stands there")
    else:

        def refuse(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(compilation.fcntl, "lockf", refuse)
    compiled = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(fla_kernels, "why_not_flash_qla", lambda *row: "this is a test")
    monkeypatch.setattr(compilation, "_key", lambda *args: "kernels")
    monkeypatch.setattr(compilation, "compile_all", lambda *args: compiled.append(args))
    mode = compilation.Mode(64, 64, torch.bfloat16, False)
    assert compilation.compile_once(mode, torch.device("cpu")).is_file() == (fault == "no locks")
    assert len(compiled) == 1
    assert ("has no locks" if fault == "no locks" else "cannot be written") in caplog.text
    assert "another process" not in caplog.text
    compilation.compile_once.cache_clear()
