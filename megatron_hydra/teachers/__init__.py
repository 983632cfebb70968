"""From a pretrained model's folder to a teacher, and to the first weights of a hybrid; checkpoints.

How these weights are trained is not decided here.
"""
