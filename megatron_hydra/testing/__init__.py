"""Test kit: ranks on one machine, tiny models and inputs. Imported by tests and benchmarks only."""

from megatron_hydra.testing.distributed import run_distributed

__all__ = ["run_distributed"]
