"""What a trained hybrid can do: retrieval by generation, perplexity, and their results' file.

The tasks themselves are in `megatron_hydra.tasks`.
"""
