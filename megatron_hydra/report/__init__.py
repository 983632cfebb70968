"""The report of a transfer: one self-contained HTML page."""

from megatron_hydra.report.page import render_report

__all__ = ["render_report"]
