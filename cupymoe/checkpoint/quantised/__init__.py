"""Quantised experts as checkpoints store them: a module for each family of files, each of which reads and writes.

:mod:`.storage` says what a storage is; :mod:`.scheme` reads out of config.json which one a weight has, and
:mod:`.resolve` sees that the files agree. :mod:`.weights` makes the weights of a layer.
"""
