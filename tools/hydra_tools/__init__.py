"""The command `megatron-hydra`: a file for each verb parses, calls `megatron_hydra.api`, prints.

Files that are no verb hold what several verbs share. What a step does is not decided here.
"""
