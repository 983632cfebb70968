"""One function for each step of a transfer; the command's verbs parse for them and print.

Each file has one of them, with what it takes and returns (`asked_models` is a part of `generate`).
What a step is made of lies in the rooms below; nothing is imported here, since a step imports
Megatron only once its arguments are checked.
"""
