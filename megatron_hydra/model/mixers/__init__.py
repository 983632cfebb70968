"""One file for each kind of head: its part of a layer, from projected heads to their outputs.

What heads of all kinds share, projection and fusion, is the layer's.
"""
