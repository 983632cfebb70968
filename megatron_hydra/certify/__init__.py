"""The certificate: that a model split over ranks computes and trains as on one.

A part of the product: users run it on their cluster. Fixtures of the tests are in `tests/kit`.
"""
