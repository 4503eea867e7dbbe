"""What measures: cases, engines that compute the same, turns, limits of the machine, results.

``case`` says what is measured, ``engines`` who takes part, ``timing`` how they take turns, ``row``
puts them together into one row of ``results``, which ``charts`` and ``report`` show.
"""
