"""What every training loop needs: configuration, run folder, data sets, the memory estimate.

Nothing here imports NeMo; the loop is `megatron_hydra.nemo`.
"""
