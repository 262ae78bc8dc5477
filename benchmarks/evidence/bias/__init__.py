"""Measure how much of a teacher's bias each loss hands on: sets with planted biases, runs, tables and figure.

Modules: ``scenes`` (the sets), ``study`` (teachers and students), ``measure`` (shares with intervals), ``tables`` and
``figure`` (the page).
"""
