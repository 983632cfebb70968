"""The published shapes of the recipes' teachers, which `estimate` takes before one is downloaded.

Source: the config.json of each base model by Qwen and Meta, and the number of parameters that the
hub counts in its safetensors (tied embeddings counted once).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text(encoding="utf-8"))
    for path in ROOT.glob("examples/*/teacher.json")
}
"""Folder of examples/ -> config.json."""
NUM_PARAMETERS = {
    "qwen3_0p6b": 596_049_920,
    "qwen3_1p7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "llama3p2_1b": 1_235_814_400,
    "llama3p2_3b": 3_212_749_824,
    "qwen2p5_1p5b": 1_543_714_304,
    "qwen2p5_7b": 7_615_616_512,
}
