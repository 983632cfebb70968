"""What models are asked: texts, needles, counterfactual pairs, probes, training documents.

Who asks, scorers, evaluation and training, lies elsewhere.
"""
