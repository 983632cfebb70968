"""One training run: YAML sections to NeMo's objects, `llm.train`, the trained hybrid."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nemo.lightning as nl
import torch
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from nemo.collections import llm

from megatron_hydra.disk import disk_full_named
from megatron_hydra.errors import UserError
from megatron_hydra.head_plan import HeadPlan
from megatron_hydra.model.build import release_cuda_graphs
from megatron_hydra.model.config import recompute_fields
from megatron_hydra.model.kernel_choice import choose_fused_kernels, choose_la_kernel
from megatron_hydra.nemo.agreement import check_ranks_agree
from megatron_hydra.nemo.bad_numbers import NumberWatch
from megatron_hydra.nemo.callbacks import KernelsCallback, ScalarsCallback, ShowStep
from megatron_hydra.nemo.checkpoint_io import make_checkpoint_callback
from megatron_hydra.nemo.data import find_end_of_document, make_data_module
from megatron_hydra.nemo.heartbeat import make_heartbeat
from megatron_hydra.nemo.model import HydraGPTConfig, HydraModel
from megatron_hydra.nemo.needles import Needles
from megatron_hydra.nemo.optimizer import make_optimizer
from megatron_hydra.nemo.quiet import QuietLogger, quieten
from megatron_hydra.nemo.run_state import RunStateCallback
from megatron_hydra.nemo.stragglers import StragglerWatch
from megatron_hydra.nemo.strategy import fp8_fields, make_plugins, make_strategy, use_gpu
from megatron_hydra.nemo.validation import Validation
from megatron_hydra.provenance import origin
from megatron_hydra.selection.shape import ModelShape
from megatron_hydra.teachers.checkpoint import (
    model_fields,
    read_metadata,
    save_checkpoint,
    tokenizer_files,
)
from megatron_hydra.teachers.distributed_weights import check_weights
from megatron_hydra.teachers.loading import megatron_fields
from megatron_hydra.teachers.tokenizer import load_tokenizer
from megatron_hydra.training.config import RunConfig
from megatron_hydra.training.config_checks import check_ranks
from megatron_hydra.training.dataset_checks import check_all_datasets
from megatron_hydra.training.going_on import newest_checkpoint, run_identity
from megatron_hydra.training.model_section import MODEL_OPTIONS
from megatron_hydra.training.run_folder import RunFolder
from megatron_hydra.training.run_inputs import check_present, datasets_hash
from megatron_hydra.training.utilization import seconds_at_peak
from megatron_hydra.transfer.hidden_states import unwrapped_model

logger = logging.getLogger(__name__)


class TrainingRun:
    """A checked run; nothing is written and no process group made before :meth:`run`.

    Attributes:
        config: The run's configuration, with what was chosen in place of None and `auto`.
        folder: Its run folder.
        identity: What its checkpoints are known by.

    Args:
        config: The run's configuration.

    Raises:
        UserError: If checkpoint, teacher, data, layout or device do not fit.
    """

    def __init__(self, config: RunConfig) -> None:
        quieten()
        self.config = config
        self.on_gpu = use_gpu(config.trainer)
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._check_layout()
        check_present(config)
        self.meta = _metadata(config.transfer.init_from, "hybrid", "transfer.init_from")
        self._check_recomputation()
        tokenizer_files(self._tokenizer)  # or the trained hybrid could not be written
        if config.transfer.teacher is not None:
            self._check_teacher(_metadata(config.transfer.teacher, "teacher", "transfer.teacher"))
        self.model_config = self._model_config()
        check_all_datasets(config, self.model_config.vocab_size)
        self._document_end, self._document_end_id = self._end_of_document()
        self._needles = Needles(config, self._tokenizer)
        self.config = self._resolved()
        self.folder = RunFolder(self.config)
        self._stragglers = StragglerWatch(self.folder)
        self.identity = run_identity(self.config, self.model_config.plan, self.meta)

    def run(
        self,
        show: ShowStep,
        start_anew: bool = False,
        asks_to_stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Train from the newest finished checkpoint, or from the start, and write the hybrid.

        Args:
            show: Called on rank 0 after each step with finished steps and scalars.
            start_anew: Leave an earlier run's checkpoints, which rank 0 is removing, aside.
            asks_to_stop: Looked at once per step: where it is true on any rank, all save and stop.

        Returns:
            The finished steps; fewer than `trainer.max_steps`, with no hybrid written, where the
            run was stopped.
        """
        config = self.config
        if config.trainer.num_threads:
            torch.set_num_threads(config.trainer.num_threads)
        torch.manual_seed(config.trainer.seed)
        checkpoint = None if start_anew else self.checkpoint
        logger.info(
            "accelerator %s; %s",
            config.trainer.accelerator,
            f"going on from {checkpoint}" if checkpoint else "starting at step 0",
        )
        end_of_document = self._document_end_id
        model = HydraModel(
            self.model_config,
            config.transfer,
            config.trainer.seed,
            self._runtime_fields(),
            end_of_document if config.data.reset_at_document_end else None,
        )
        # In a function, which NeMo's copies of its arguments leave alone.
        watch = NumberWatch(self.folder, lambda: asks_to_stop())
        trainer = self._trainer(show, watch, checkpoint)
        with disk_full_named(self.folder.checkpoints):
            try:
                self._fit(model, trainer, watch, end_of_document, checkpoint)
            finally:
                # NeMo keeps the first run's: a next one in this process has its own batches.
                unset_num_microbatches_calculator()
            if trainer.global_step == config.trainer.max_steps:
                self._write_hybrid(model)
        return int(trainer.global_step)

    @staticmethod
    def wait_for_ranks() -> None:
        """Return when every rank has come here; after :meth:`run`."""
        torch.distributed.barrier()

    def _fit(
        self,
        model: HydraModel,
        trainer: nl.Trainer,
        watch: NumberWatch,
        end_of_document: int,
        checkpoint: Path | None,
    ) -> None:
        config = self.config
        try:
            llm.train(
                model=model,
                data=make_data_module(config.data, end_of_document, self.folder.data_index),
                trainer=trainer,
                log=QuietLogger(
                    explicit_log_dir=str(self.folder.nemo_logs),
                    log_global_rank_0_only=True,
                ),
                resume=nl.AutoResume(resume_from_path=str(checkpoint)) if checkpoint else None,
                optim=make_optimizer(
                    config.optim,
                    config.trainer.max_steps,
                    config.strategy.use_distributed_optimizer,
                    self._bf16,
                    watch,
                    self._stragglers,
                ),
            )
        finally:
            if config.model.cuda_graphs and hasattr(model, "module"):
                release_cuda_graphs(unwrapped_model(model.module))

    @cached_property
    def checkpoint(self) -> Path | None:
        """What the run goes on from, found when it is first asked for; None: from the start.

        Raises:
            UserError: If the run cannot go on.
        """
        return newest_checkpoint(self.folder, self.identity)

    def check_goes_on(self) -> None:
        """Raise what keeps the run from going on now, before anything is written."""
        _ = self.checkpoint

    def _trainer(self, show: ShowStep, watch: NumberWatch, checkpoint: Path | None) -> nl.Trainer:
        config = self.config
        facts = {
            **self.identity.inputs,
            "data.validation_paths": datasets_hash(config.data.validation),
            "checkpoint to go on from": str(checkpoint),
        }
        scalars = ScalarsCallback(
            self.folder,
            show,
            watch,
            [
                Validation(config, self._document_end_id, self.folder.data_index),
                self._needles,
                self._stragglers,
            ],
            self._seconds_at_peak(),
        )
        trainer = nl.Trainer(
            accelerator="gpu" if self.on_gpu else "cpu",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            max_steps=config.trainer.max_steps,
            strategy=make_strategy(
                config.strategy,
                "nccl" if self.on_gpu else "gloo",
                torch.bfloat16 if self._bf16 else torch.float32,
                config.resume.async_save,
                when_joined=lambda: check_ranks_agree(self.folder.path, facts),
            ),
            plugins=make_plugins(config.trainer),
            callbacks=[
                KernelsCallback(config.data.micro_batch_size),
                *make_heartbeat(config.strategy.heartbeat_seconds, self.folder.path),
                self._stragglers,
                watch,
                scalars,
                RunStateCallback(self.identity),
                make_checkpoint_callback(self.folder.checkpoints, config.resume),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            val_check_interval=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        # Lightning's handlers end the loop with exit code 0, on the one rank that got the signal.
        trainer._signal_connector.register_signal_handlers = lambda: None
        return trainer

    def _seconds_at_peak(self) -> float | None:
        if not self.on_gpu:
            return None
        shape = ModelShape.from_config(self.model_config)  # type: ignore[arg-type]
        name = torch.cuda.get_device_name()
        return seconds_at_peak(self.config, shape, self.model_config.plan, name, self.world_size)

    def _write_hybrid(self, model: HydraModel) -> None:
        device = torch.cuda.get_device_name() if self.on_gpu else "CPU"
        provenance = origin(
            stage=self.config.transfer.stage,
            init_from=self.meta["provenance"],
            max_steps=self.config.trainer.max_steps,
            seq_length=self.config.data.seq_length,
            inputs=dict(self.identity.inputs),
            hardware=f"{self.world_size} x {device}",
        )
        # The run is placed for its own length; the model still reaches as far as it did before.
        model_config = copy.copy(self.model_config)
        model_config.seq_length = max(
            self.meta["config"]["seq_length"], self.config.data.seq_length
        )
        save_checkpoint(
            self.folder.hybrid,
            unwrapped_model(model.module),
            model_config,  # type: ignore[arg-type]
            self.model_config.plan,
            self._tokenizer,
            provenance,
            overwrite=True,
            teacher_weights_hash=self.meta["teacher_weights_hash"],
            teacher_license=self.meta["teacher_license"],
        )

    def _check_layout(self) -> None:
        config, strategy = self.config, self.config.strategy
        check_ranks(config, self.world_size)
        uses_te = self.on_gpu and config.model.backend != "local"
        for wanted, is_wanted in (
            ("trainer.precision fp8", config.trainer.precision == "fp8"),
            ("model.cuda_graphs", config.model.cuda_graphs),
            (f"strategy.cp_comm_type {strategy.cp_comm_type}", strategy.cp_comm_type is not None),
        ):
            if is_wanted and not uses_te:
                raise UserError(f"{wanted} needs a GPU and model.backend transformer_engine")

    def _check_recomputation(self) -> None:
        """Of the hybrid alone: a teacher recomputes nothing."""
        num_stages = self.config.strategy.pipeline_model_parallel_size
        of_stage = self.meta["config"]["num_layers"] // num_stages
        if (recomputed := self.config.model.recompute_layers or 0) > of_stage:
            raise UserError(
                f"model.recompute_layers {recomputed} is above a pipeline stage's {of_stage} layers"
            )

    def _check_teacher(self, teacher: dict[str, Any]) -> None:
        if teacher["config"]["vocab_size"] != self.meta["config"]["vocab_size"] or (
            self.config.transfer.stage == "align"
            and teacher["teacher_config_hash"] != self.meta["teacher_config_hash"]
        ):
            raise UserError(
                f"transfer.teacher {self.config.transfer.teacher} is not the teacher of "
                f"{self.config.transfer.init_from}: their shapes differ"
            )
        converted_from = {meta["teacher_weights_hash"] for meta in (teacher, self.meta)}
        if len(converted_from) == 2 and "" not in converted_from:
            sentence = (
                f"transfer.teacher {self.config.transfer.teacher} is not the teacher of "
                f"{self.config.transfer.init_from}: they were converted from different weights"
            )
            if self.config.transfer.stage == "align":
                raise UserError(sentence)
            logger.warning("%s", sentence)  # another teacher may be wanted here

    def _model_config(self) -> HydraGPTConfig:
        config, model = self.config, self.config.model
        chosen = {
            name: getattr(model, name) for name in MODEL_OPTIONS if getattr(model, name) is not None
        }
        if model.cuda_graphs:
            chosen["cuda_graph_impl"] = "local"
        return HydraGPTConfig(
            **{
                **model_fields(self.meta),
                **self._runtime_fields(),
                **chosen,
                **recompute_fields(model.recompute, model.recompute_layers),
                "seq_length": config.data.seq_length,
                "tensor_model_parallel_size": config.strategy.tensor_model_parallel_size,
                "pipeline_model_parallel_size": config.strategy.pipeline_model_parallel_size,
                "context_parallel_size": config.strategy.context_parallel_size,
            },
            plan=HeadPlan.load(f"{config.transfer.init_from}/plan.json"),
        )

    def _resolved(self) -> RunConfig:
        """The configuration as the run takes it, for its folder."""
        options = {name: getattr(self.model_config, name) for name in MODEL_OPTIONS}
        options["la_kernel"] = choose_la_kernel(self.model_config.la_kernel)
        options["fused_kernels"] = choose_fused_kernels(self.model_config.fused_kernels)
        model = replace(self.config.model, **options)
        trainer = replace(self.config.trainer, accelerator="gpu" if self.on_gpu else "cpu")
        data = replace(self.config.data, end_of_document=self._document_end)
        return replace(self.config, model=model, trainer=trainer, data=data)

    def _runtime_fields(self) -> dict[str, Any]:
        """What student and teacher have in common of how they run."""
        by_device = "transformer_engine" if self.on_gpu else "local"
        fields: dict[str, Any] = {
            "sequence_parallel": self.config.strategy.sequence_parallel,
            "cp_comm_type": self.config.strategy.cp_comm_type,
            "backend": self.config.model.backend or by_device,
        }
        if self._bf16:
            fields |= megatron_fields(torch.bfloat16)
        fields |= fp8_fields(self.config.trainer)
        if fields["backend"] == "transformer_engine":
            fields |= {"apply_rope_fusion": True, "bias_activation_fusion": True}
        return fields

    @property
    def _tokenizer(self) -> Path:
        return Path(self.config.transfer.init_from) / "tokenizer"

    @property
    def _bf16(self) -> bool:
        return self.config.trainer.precision != "fp32"

    def _end_of_document(self) -> tuple[str | None, int]:
        data = self.config.data
        is_read = data.mask_end_of_document or data.reset_at_document_end
        if not is_read and data.end_of_document is None:
            return None, -1  # never read
        every = replace(data, paths=[*data.paths, *data.validation_paths])
        return find_end_of_document(every, load_tokenizer(self._tokenizer))


def _metadata(folder: str, kind: str, key: str) -> dict[str, Any]:
    meta = read_metadata(folder)
    if meta["kind"] != kind:
        raise UserError(f"{key} {folder} is a {meta['kind']} checkpoint; a {kind} is needed")
    check_weights(Path(folder) / "weights")
    return meta
