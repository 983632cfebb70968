"""A study: many hybrids of a few teachers, each trained and measured alike, and what follows.

It owns which arms there are, how one is run from its plan to its result, the statistics between
arms, and the page that they make. It trains, converts and evaluates by `megatron_hydra.api` alone;
processes, time and files that are carried about are the tool's, `hydra_tools.study`.
"""
