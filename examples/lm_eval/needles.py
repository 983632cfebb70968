"""The metric of hydra_needles.yaml: RULER's string_match_all."""

from __future__ import annotations

from typing import Any


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of a sample's answers that the generated text contains."""
    answers, text = doc["answers"], results[0].lower()
    return {"found": sum(answer.lower() in text for answer in answers) / len(answers)}
