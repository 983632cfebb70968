"""The report of a transfer: one self-contained HTML page, its templates, and all pictures of heads.

Nothing is measured or chosen here: the figures are those of other rooms' files.
"""

from megatron_hydra.report.page import render_report

__all__ = ["render_report"]
