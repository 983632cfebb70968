"""Which heads stay full attention: scores, how sure they are, budgets, costs, plans.

The measurements on a model are in `scorers`; where a plan's heads run is `model.placement`'s.
"""
