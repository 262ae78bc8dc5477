"""How much of a teacher's bias each loss hands on to the student: sets with planted biases, runs, tables and figure.

Modules: ``scenes`` (the sets), ``study`` (teachers and students), ``measure`` (shares with intervals), ``tables`` and
``figure`` (the page).
"""
